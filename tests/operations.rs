//! docs/operations.md, which tests compare with the program.
pub const OPERATIONS: &str = include_str!("../docs/operations.md");

/// The first table below this heading, without its own first two lines, in cells.
///
/// # Panics
/// Where there is no such heading.
pub fn table(heading: &str) -> Vec<Vec<&'static str>> {
    let (_, section) = OPERATIONS.split_once(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("no {heading}"));
    let rows = section.lines().skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|'));
    rows.skip(2).map(|row| row.trim_matches('|').split('|').map(str::trim).collect()).collect()
}
