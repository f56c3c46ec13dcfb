//! Ids that stay with what they name, and are given to something else as late as can be: flows and affinity entries in
//! the kernel remember them.
use std::collections::BTreeMap;

/// Hands out the ids `1..=limit`, each for one key, counting how often it is held.
#[derive(Debug)]
pub struct Pool<K> {
    /// Held, or released and not yet given to another key.
    entries: BTreeMap<K, Entry>,
    /// Released keys by the turn of their release.
    released: BTreeMap<u64, K>,
    turn: u64,
    /// Releases before this turn are in force everywhere.
    settled: u64,
    /// The lowest id that no key ever had.
    fresh: u32,
    /// Ids below `fresh` that no key has.
    gaps: Vec<u32>,
    limit: u32,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    id: u32,
    holders: u32,
    released: u64,
}

/// All ids are held, or were until a moment ago.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("all {0} ids are taken")]
pub struct Full(u32);

impl<K: Ord + Clone> Pool<K> {
    /// `known` are the keys and ids of an earlier run, none of them held for now. An id beyond the limit, or a key's
    /// second id, is forgotten.
    pub fn restore(limit: u32, known: impl IntoIterator<Item = (u32, K)>) -> Self {
        let mut pool = Pool {
            entries: BTreeMap::new(),
            released: BTreeMap::new(),
            turn: 0,
            settled: 0,
            fresh: 1,
            gaps: Vec::new(),
            limit,
        };
        let by_id: BTreeMap<u32, K> = known.into_iter().filter(|(id, _)| (1..=limit).contains(id)).collect();
        for (id, key) in by_id {
            pool.gaps.extend(pool.fresh..id);
            pool.fresh = id + 1;
            if pool.entries.contains_key(&key) {
                pool.gaps.push(id);
                continue;
            }
            pool.entries.insert(key.clone(), Entry { id, holders: 0, released: pool.turn });
            pool.released.insert(pool.turn, key);
            pool.turn += 1;
        }
        pool.settled = pool.turn;
        pool
    }

    /// The key's id, held once more.
    ///
    /// # Errors
    /// Where it has none and none is free.
    pub fn hold(&mut self, key: &K) -> Result<u32, Full> {
        if let Some(entry) = self.entries.get_mut(key) {
            if entry.holders == 0 {
                self.released.remove(&entry.released);
            }
            entry.holders += 1;
            return Ok(entry.id);
        }
        let id = self.free_id().ok_or(Full(self.limit))?;
        self.entries.insert(key.clone(), Entry { id, holders: 1, released: 0 });
        Ok(id)
    }

    fn free_id(&mut self) -> Option<u32> {
        if self.fresh <= self.limit {
            self.fresh += 1;
            return Some(self.fresh - 1);
        }
        if let Some(id) = self.gaps.pop() {
            return Some(id);
        }
        let oldest = self.released.first_entry().filter(|entry| *entry.key() < self.settled)?;
        let key = oldest.remove();
        self.entries.remove(&key).map(|entry| entry.id)
    }

    /// The id, where this was its last holder. The key has it again if it comes back in time.
    pub fn release(&mut self, key: &K) -> Option<u32> {
        let entry = self.entries.get_mut(key)?;
        entry.holders = entry.holders.checked_sub(1)?;
        if entry.holders > 0 {
            return None;
        }
        entry.released = self.turn;
        self.released.insert(self.turn, key.clone());
        self.turn += 1;
        Some(entry.id)
    }

    /// What was released up to now is out of the kernel, and may be given to others.
    pub fn settle(&mut self) {
        self.settled = self.turn;
    }

    /// Builds the large map anew, each of its nodes full, of equal keys.
    pub fn repack(&mut self, renewed: impl Fn(&K) -> K) {
        self.entries = self.entries.iter().map(|(key, entry)| (renewed(key), *entry)).collect();
    }

    /// Whether a new key would get an id.
    pub fn has_room(&self) -> bool {
        self.fresh <= self.limit
            || !self.gaps.is_empty()
            || self.released.first_key_value().is_some_and(|(turn, _)| *turn < self.settled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_given_to_another_key_as_late_as_can_be() {
        let mut pool = Pool::restore(3, []);
        assert_eq!([pool.hold(&"a"), pool.hold(&"b")], [Ok(1), Ok(2)]);
        assert_eq!([pool.release(&"b"), pool.release(&"a")], [Some(2), Some(1)]);
        pool.settle();
        assert_eq!([pool.hold(&"c"), pool.hold(&"d"), pool.hold(&"e")], [Ok(3), Ok(2), Ok(1)]);
        assert_eq!(pool.hold(&"f"), Err(Full(3)));
    }

    #[test]
    fn a_key_that_comes_back_has_its_id_again() {
        let mut pool = Pool::restore(4, []);
        assert_eq!(pool.hold(&"a"), Ok(1));
        pool.release(&"a");
        pool.settle();
        assert_eq!([pool.hold(&"b"), pool.hold(&"a")], [Ok(2), Ok(1)]);
    }

    #[test]
    fn a_released_id_is_not_given_out_before_the_kernel_has_forgotten_it() {
        let mut pool = Pool::restore(1, []);
        assert_eq!(pool.hold(&"a"), Ok(1));
        pool.release(&"a");
        assert!(!pool.has_room());
        assert_eq!(pool.hold(&"b"), Err(Full(1)));
        pool.settle();
        assert_eq!(pool.hold(&"b"), Ok(1));
    }

    #[test]
    fn an_id_is_released_with_its_last_holder() {
        let mut pool = Pool::restore(1, []);
        assert_eq!([pool.hold(&"a"), pool.hold(&"a")], [Ok(1), Ok(1)]);
        assert_eq!([pool.release(&"a"), pool.release(&"a"), pool.release(&"a")], [None, Some(1), None]);
    }

    #[test]
    fn a_restart_keeps_ids_and_fills_gaps_before_it_takes_one_away() {
        let mut pool = Pool::restore(4, [(3, "c"), (1, "a"), (9, "beyond"), (4, "a")]);
        assert_eq!([pool.hold(&"c"), pool.hold(&"a")], [Ok(3), Ok(1)]);
        let mut fresh = [pool.hold(&"x").unwrap(), pool.hold(&"y").unwrap()];
        fresh.sort_unstable();
        assert_eq!(fresh, [2, 4]);
    }
}
