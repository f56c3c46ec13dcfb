//! docs/dataplane.md says of each reason what its table of `reason.rs` says.
use svc_common::Reason;

const DOCS: &str = include_str!("../../docs/dataplane.md");

#[test]
fn the_docs_list_every_reason_in_its_order_with_its_meaning() {
    let rows: Vec<Vec<&str>> = DOCS
        .lines()
        .filter(|line| line.starts_with("| `"))
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    let documented: Vec<(&str, &str)> = rows.iter().map(|row| (row[0].trim_matches('`'), row[1])).collect();
    let known: Vec<(&str, &str)> = Reason::ALL.iter().map(|reason| (reason.label(), reason.description())).collect();
    assert_eq!(documented, known);
    for row in rows {
        assert!(row.len() == 4 && row.iter().all(|cell| !cell.is_empty()), "{row:?}");
    }
}
