//! Choices that the rules leave, each taken in its turn.

/// A walk through a tree of choices: the first way down is the first one at each fork.
#[derive(Clone, PartialEq, Default, Debug)]
pub(crate) struct Chance {
    /// What was taken, of how many.
    taken: Vec<(usize, usize)>,
    at: usize,
}

impl Chance {
    /// One of so many.
    pub(crate) fn pick(&mut self, of: usize) -> usize {
        if self.at == self.taken.len() {
            self.taken.push((0, of));
        }
        self.at += 1;
        self.taken[self.at - 1].0
    }

    /// To the next way down; false where there is none.
    pub(crate) fn turn(&mut self) -> bool {
        self.at = 0;
        while let Some((taken, of)) = self.taken.pop() {
            if taken + 1 < of {
                self.taken.push((taken + 1, of));
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::Chance;

    #[test]
    fn each_way_is_gone_once() {
        let mut chance = Chance::default();
        let mut ways = Vec::new();
        loop {
            let first = chance.pick(2);
            ways.push((first, if first == 0 { chance.pick(3) } else { 9 }));
            if !chance.turn() {
                break;
            }
        }
        assert_eq!(ways, [(0, 0), (0, 1), (0, 2), (1, 9)]);
    }
}
