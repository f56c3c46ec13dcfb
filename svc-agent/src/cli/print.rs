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
        Format::Json => text(&(serde_json::to_string_pretty(data)? + "\n")),
        Format::Yaml | Format::Table => text(&serde_saphyr::to_string(&data)?),
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

/// Columns as wide as their widest cell, three spaces apart.
pub fn table<R: Row>(rows: &[R]) -> String {
    let header = R::HEADER.iter().map(|name| (*name).to_owned()).collect();
    let lines: Vec<Vec<String>> = std::iter::once(header).chain(rows.iter().map(Row::cells)).collect();
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

    #[test]
    fn a_header_wider_than_its_cells_sets_the_width() {
        assert_eq!(table(&[Pair("a", Some(1))]), "NAME   N\na      1\n");
    }

    #[test]
    fn what_is_empty_has_its_header_alone() {
        assert_eq!(table::<Pair>(&[]), "NAME   N\n");
    }
}
