//! The log, on standard error. Names in it are others': what a terminal would obey, or what would begin a line, is escaped.
use std::fmt;
use std::io::{self, IsTerminal as _, Write};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::field::MakeExt as _;
use tracing_subscriber::fmt::format::{Writer, debug_fn};

use super::LogFormat;
use super::print::{escape, one_line};

pub(super) fn start(filter: EnvFilter, format: LogFormat) {
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_target(false);
    match format {
        LogFormat::Text => log
            .with_writer(io::stderr)
            .with_ansi(io::stderr().is_terminal())
            .fmt_fields(
                debug_fn(|writer: &mut Writer<'_>, field, value: &dyn fmt::Debug| {
                    let value = one_line(&format!("{value:?}"));
                    if field.name() == "message" {
                        writer.write_str(&value)
                    } else {
                        write!(writer, "{}={value}", field.name())
                    }
                })
                .delimited(" "),
            )
            .init(),
        LogFormat::Json => log.with_writer(|| Escaped(io::stderr())).json().flatten_event(true).init(),
    }
}

/// Of lines of JSON, whose strings mean the same afterwards. Each comes by one call.
struct Escaped<W>(W);

impl<W: Write> Write for Escaped<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.write_all(escape(&String::from_utf8_lossy(line)).as_bytes())?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_begins_no_line() {
        assert_eq!(one_line("a\nWARN b\r\u{1b}[2J"), r"a\nWARN b\u000d\u001b[2J");
    }

    #[test]
    fn a_line_of_json_says_the_same_and_ends_where_it_did() {
        let mut written = Vec::new();
        let line = "{\"message\":\"a\u{202e}\u{9b}b\"}\n";
        assert_eq!(Escaped(&mut written).write(line.as_bytes()).unwrap(), line.len());
        assert_eq!(String::from_utf8(written).unwrap(), "{\"message\":\"a\\u202e\\u009bb\"}\n");
    }
}
