//! One line a step: what is being done, and how long it took. The output of its command goes to a log, and is shown when it
//! fails.
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

/// Runs `command` quietly, under this title.
pub(crate) fn step(title: &str, command: &mut Command) -> Result<()> {
    let log = log_file(title)?;
    let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    announce(title);
    let start = Instant::now();
    let status = command
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .status()
        .with_context(|| not_started(command))?;
    println!("{:.1} s", start.elapsed().as_secs_f32());
    if status.success() {
        return Ok(());
    }
    let text = fs::read(&log)?;
    eprintln!("{}", String::from_utf8_lossy(&text).trim_end());
    bail!("{title} failed: `{}` ended with {status}", rendered(command));
}

/// Runs `command` with its own output on the terminal: for cargo, which shows its progress itself.
pub(crate) fn shown(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| not_started(command))?;
    require_success(command, status)
}

/// A line for a step that needed no work.
pub(crate) fn done(title: &str, detail: &str) {
    announce(title);
    println!("{detail}");
}

pub(crate) fn announce(title: &str) {
    print!("  {title:.<44} ");
    // Without a newline the line is not written by itself, and the wait would go unexplained.
    let _ = std::io::stdout().flush();
}

/// What a command that succeeds writes to its standard output.
pub(crate) fn output(command: &mut Command) -> Option<String> {
    let result = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    result.status.success().then(|| String::from_utf8_lossy(&result.stdout).into_owned())
}

fn require_success(command: &Command, status: ExitStatus) -> Result<()> {
    if !status.success() {
        bail!("`{}` ended with {status}", rendered(command));
    }
    Ok(())
}

fn not_started(command: &Command) -> String {
    format!("cannot start {}", command.get_program().display())
}

fn rendered(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

fn log_file(title: &str) -> Result<PathBuf> {
    let directory = root().join("target/xtask");
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let name: String = title.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    Ok(directory.join(format!("{name}.log")))
}

/// The workspace's directory.
pub(crate) fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// The cargo that runs this, in the workspace's directory.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root());
    cargo
}

/// A program of the workspace, which cargo puts beside this one.
pub(crate) fn program(name: &str) -> Result<Command> {
    let own = std::env::current_exe().context("cannot tell the path of this program")?;
    let mut program = Command::new(own.with_file_name(name));
    program.current_dir(root());
    Ok(program)
}
