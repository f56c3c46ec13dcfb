//! Rows to a table, JSON or YAML on stdout.
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::PathBuf;

use clap::ValueEnum;
use serde::Serialize;

/// The flags of every subcommand that prints what is in the kernel.
#[derive(clap::Args, Debug)]
pub struct Inspect {
    /// Where maps, programs and links are pinned.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/svc")]
    pub bpffs: PathBuf,

    /// How it is printed.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    pub output: Format,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    Table,
    Json,
    Yaml,
}

/// One line of a table, and one object of a list.
pub trait Row: Serialize {
    const HEADER: &'static [&'static str];

    fn cells(&self) -> Vec<String>;
}

/// # Errors
/// Where stdout does not take it.
pub fn rows<R: Row>(format: Format, rows: &[R]) -> anyhow::Result<()> {
    match format {
        Format::Table if rows.is_empty() => eprintln!("There are none."),
        Format::Table => text(&table(rows))?,
        Format::Json | Format::Yaml => data(format, rows)?,
    }
    Ok(())
}

/// `format` is one for machines; a table counts as YAML.
///
/// # Errors
/// Where stdout does not take it.
pub fn data<T: Serialize + ?Sized>(format: Format, data: &T) -> anyhow::Result<()> {
    match format {
        Format::Json => text(&(escape(&serde_json::to_string_pretty(data)?) + "\n")),
        Format::Yaml | Format::Table => text(&escape(&serde_saphyr::to_string(&data)?)),
    }
}

/// A reader that has seen enough (`| head`) is no failure.
///
/// # Errors
/// Where stdout does not take it.
pub fn text(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

/// Nothing that moves a terminal's cursor or turns its text round: names come from objects and interfaces that others have
/// made. Line ends stay. In JSON's strings what comes out means the same.
pub fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        if character != '\n' && (character.is_control() || is_invisible(character)) {
            let mut units = [0; 2];
            for unit in character.encode_utf16(&mut units) {
                let _ = write!(safe, "\\u{unit:04x}");
            }
        } else {
            safe.push(character);
        }
    }
    safe
}

/// [`escape`], of what is one line.
pub fn one_line(text: &str) -> String {
    escape(text).replace('\n', "\\n")
}

/// Directions, joiners and separators (Unicode's Cf, Zl and Zp, as far as they change how other text looks).
fn is_invisible(character: char) -> bool {
    matches!(character, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// Columns as wide as their widest cell, three spaces apart.
pub fn table<R: Row>(rows: &[R]) -> String {
    let header = R::HEADER.iter().map(|name| (*name).to_owned()).collect();
    // A cell is one line.
    let cells = |row: &R| row.cells().iter().map(|cell| escape(cell).replace('\n', "\\n")).collect();
    let lines: Vec<Vec<String>> = std::iter::once(header).chain(rows.iter().map(cells)).collect();
    let mut widths = vec![0; R::HEADER.len()];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for line in &lines {
        let mut padded = String::new();
        for (width, cell) in widths.iter().zip(line) {
            let _ = write!(padded, "{cell:width$}   ");
        }
        text.push_str(padded.trim_end());
        text.push('\n');
    }
    text
}

/// `-` where there is none.
pub fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

pub fn yes_no(value: bool) -> String {
    if value { "yes" } else { "no" }.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[derive(Serialize)]
    struct Pair(&'static str, Option<u32>);

    impl Row for Pair {
        const HEADER: &'static [&'static str] = &["NAME", "N"];

        fn cells(&self) -> Vec<String> {
            vec![self.0.to_owned(), or_dash(self.1)]
        }
    }

    #[test]
    fn columns_are_aligned_and_lines_end_without_spaces() {
        let rows = [Pair("a", Some(1)), Pair("schön-lang", None)];
        assert_eq!(table(&rows), "NAME         N\na            1\nschön-lang   -\n");
    }

    #[rstest]
    #[case("web", "web")]
    #[case("schön 網", "schön 網")]
    #[case("\u{1b}[2J\r", r"\u001b[2J\u000d")]
    #[case("\u{9b}31m\u{7f}", r"\u009b31m\u007f")]
    #[case("ab\u{202e}cd", r"ab\u202ecd")]
    #[case("a\nb", "a\nb")]
    fn what_a_terminal_would_obey_is_shown_instead(#[case] text: &str, #[case] safe: &str) {
        assert_eq!(escape(text), safe);
    }

    #[test]
    fn a_hostile_name_stays_in_its_cell() {
        let row = Pair("a\nb\u{1b}]0;x\u{7}", None);
        assert_eq!(table(&[row]), "NAME                   N\na\\nb\\u001b]0;x\\u0007   -\n");
    }

    #[test]
    fn json_with_a_hostile_name_still_says_it() {
        let name = "\u{9b}\u{7f}\u{1b}\u{202e}";
        let json = escape(&serde_json::to_string(name).unwrap());
        assert!(json.is_ascii() && !json.contains('\u{7f}'), "{json}");
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), name);
    }

    #[test]
    fn yaml_with_a_hostile_name_still_says_it() {
        let name = "a\u{9b}\u{7f}\u{1b}\u{202e}";
        let yaml = escape(&serde_saphyr::to_string(&[name]).unwrap());
        assert!(yaml.is_ascii(), "{yaml}");
        assert_eq!(serde_saphyr::from_str::<Vec<String>>(&yaml).unwrap(), [name]);
    }

    #[test]
    fn a_header_wider_than_its_cells_sets_the_width() {
        assert_eq!(table(&[Pair("a", Some(1))]), "NAME   N\na      1\n");
    }

    #[test]
    fn what_is_empty_has_its_header_alone() {
        assert_eq!(table::<Pair>(&[]), "NAME   N\n");
    }
}
