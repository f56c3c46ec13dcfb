//! Programs of Go modules, built once.
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, bail};

/// Where what was built stays.
pub fn cache() -> Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME") {
        Some(directory) => directory.into(),
        None => PathBuf::from(env::var_os("HOME").context("HOME is not set")?).join(".cache"),
    };
    Ok(base.join("svc"))
}

/// One at a time in this process: two tests may want the same program, and each build takes all cores.
static BUILDING: Mutex<()> = Mutex::new(());

/// Builds a package that `module`, a directory with a go.mod, requires, unless it is there. `flags`: of `go build`.
pub fn build(module: &Path, flags: &[&str], package: &str, target: &Path) -> Result<()> {
    compile(&[&["build", "-trimpath", "-ldflags", "-s -w"], flags].concat(), module, package, target)
}

/// Builds the tests of a package, unless they are there.
pub fn build_test(module: &Path, package: &str, target: &Path) -> Result<()> {
    compile(&["test", "-c"], module, package, target)
}

fn compile(how: &[&str], module: &Path, package: &str, target: &Path) -> Result<()> {
    // What is there waits for no build of another program.
    if target.exists() {
        return Ok(());
    }
    let _alone = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
    if target.exists() {
        return Ok(());
    }
    let name = target.file_name().unwrap_or_default().display().to_string();
    eprintln!("  building {name}; this happens once and takes minutes");
    let start = Instant::now();
    // Under its final name only when it is whole: a build may be interrupted, or run in two processes at once.
    let unfinished = target.with_file_name(format!("{name}.{}", std::process::id()));
    let status = Command::new("go")
        .args(how)
        .args(["-mod=readonly", "-buildvcs=false", "-o"])
        .args([unfinished.as_os_str(), package.as_ref()])
        .current_dir(module)
        .env("CGO_ENABLED", "0")
        .status()
        .context("cannot start go: install Go 1.26")?;
    if !status.success() {
        bail!("building {package} ended with {status}");
    }
    fs::rename(unfinished, target)?;
    eprintln!("  {name} built in {:.0} s", start.elapsed().as_secs_f32());
    Ok(())
}

/// The version of a module that a go.mod requires.
pub fn version<'a>(requirements: &'a str, module: &str) -> Result<&'a str> {
    let line = requirements.lines().find(|line| {
        let words: Vec<&str> = line.trim_start_matches("require").split_whitespace().collect();
        words.len() >= 2 && words[0] == module && words[1].starts_with('v')
    });
    line.and_then(|line| line.split_whitespace().find(|word| word.starts_with('v')))
        .with_context(|| format!("go.mod requires no {module}"))
}

/// Where the sources of a module are that `from` requires.
pub fn source(from: &Path, module: &str) -> Result<PathBuf> {
    let mut go = Command::new("go");
    go.args(["list", "-m", "-mod=readonly", "-f", "{{.Dir}}", module]).current_dir(from);
    let output = go.output().context("cannot start go: install Go 1.26")?;
    if !output.status.success() {
        bail!("go list: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().into())
}
