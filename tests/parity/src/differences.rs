//! The differences that are accepted. Each stands in docs/parity.md, with its reason.
use crate::report::Row;

pub struct Difference {
    /// The row of docs/parity.md that gives the reason.
    pub what: &'static str,
    pub accepts: fn(&Row<'_>) -> bool,
}

/// The first that accepts a row explains it.
pub const ALL: &[Difference] = &[];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_difference_stands_in_the_document() {
        let document = include_str!("../../../docs/parity.md");
        for Difference { what, .. } in ALL {
            assert!(document.contains(&format!("| {what} |")), "docs/parity.md has no row called {what:?}");
        }
    }
}
