//! The tests on other kernels: Debian's, started in a virtual machine whose whole file system is an archive in memory.
mod archive;
mod guest;
mod kernel;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::setup;
use crate::step::{cargo, done, root, shown};
use guest::{Busybox, Guest};
use kernel::Kernel;

/// Load the programs and run packets and traffic through them on other kernels, in virtual machines.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Series of kernels, as Debian has them.
    #[arg(default_values = SERIES)]
    versions: Vec<String>,
    /// Tests of tests/namespaces.rs to run: those whose name holds one of these.
    #[arg(long = "namespaces", value_name = "FILTER", default_values = NAMESPACE_TESTS)]
    filters: Vec<String>,
    /// For each kernel, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = TIMEOUT)]
    timeout: u64,
}

/// The oldest that is served, and the newest that Debian's stable releases have.
const SERIES: [&str; 2] = ["6.1", "6.12"];
/// Every program with traffic on it. All of these tests would take an hour: nothing runs natively in there.
const NAMESPACE_TESTS: [&str; 1] = ["every_backend_answers_whoever_asks"];
/// Without those that load the programs for an agent or two each, and those that ask for speed: the neighbour's change has to
/// happen within a tick.
const PACKET_TESTS: [&str; 7] = [
    "--quiet",
    "--skip",
    "agent::",
    "--skip",
    "twenty_thousand_connections_to_one_backend_elsewhere",
    "--skip",
    "a_change_that_nobody_tells_of_is_seen_after_a_tick",
];
const TIMEOUT: u64 = 1200;

pub(crate) fn run(options: &Options) -> Result<()> {
    setup::ensure()?;
    setup::ensure_lab_tools()?;
    let directory = directory()?;
    let busybox = prepare(&directory, &options.versions)?;
    let kernels =
        options.versions.iter().map(|series| kernel::ensure(&directory, series)).collect::<Result<Vec<_>>>()?;
    shown(cargo().arg("build"))?;
    let filters: Vec<&str> = options.filters.iter().map(String::as_str).collect();
    test(&directory, busybox, &kernels, &filters, Duration::from_secs(options.timeout))
}

/// One of all tests, once the rest is built. What cannot be had here is skipped.
pub(crate) fn run_where_possible() -> Result<()> {
    let directory = directory()?;
    let busybox = match prepare(&directory, &SERIES) {
        Ok(busybox) => busybox,
        Err(error) => {
            done("other kernels", &format!("skipped; {error:#}"));
            return Ok(());
        }
    };
    let mut kernels = Vec::new();
    for series in SERIES {
        match kernel::ensure(&directory, series) {
            Ok(kernel) => kernels.push(kernel),
            Err(error) => done(&format!("Linux {series}"), &format!("skipped; {error:#}")),
        }
    }
    if kernels.is_empty() {
        return Ok(());
    }
    test(&directory, busybox, &kernels, &NAMESPACE_TESTS, Duration::from_secs(TIMEOUT))
}

fn directory() -> Result<PathBuf> {
    let directory = root().join("target/xtask/vm");
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    Ok(directory)
}

/// All that is needed besides the kernels.
fn prepare(directory: &Path, versions: &[impl AsRef<str>]) -> Result<Busybox> {
    setup::ensure_vm_tools()?;
    if !Busybox::is_kept(directory) || !versions.iter().all(|series| kernel::is_kept(directory, series.as_ref())) {
        setup::package_lists()?;
    }
    Busybox::ensure(directory)
}

/// All kernels at once: a machine in there has one processor.
fn test(directory: &Path, busybox: Busybox, kernels: &[Kernel], filters: &[&str], timeout: Duration) -> Result<()> {
    let tests = [("verifier", &["--nocapture"][..]), ("packets", &PACKET_TESTS), ("namespaces", filters)];
    let binaries = built(&tests.map(|(name, _)| name))?;
    let mut guest = Guest::new(directory, busybox)?;
    for ((name, arguments), binary) in tests.iter().zip(&binaries) {
        guest.add_test(name, binary, arguments)?;
    }
    let guest = &guest;
    let failed: Vec<&str> = thread::scope(|scope| {
        let run = |kernel: &'_ Kernel| {
            let result = guest.run(kernel, timeout);
            result.inspect_err(|error| println!("  Linux {}: {error:#}", kernel.release)).is_err()
        };
        let running: Vec<_> = kernels.iter().map(|kernel| (kernel, scope.spawn(move || run(kernel)))).collect();
        let ended =
            running.into_iter().map(|(kernel, thread)| (kernel.release.as_str(), thread.join().unwrap_or(true)));
        ended.filter(|(_, failed)| *failed).map(|(release, _)| release).collect()
    });
    if !failed.is_empty() {
        bail!("not all is well on Linux {}", failed.join(", "));
    }
    Ok(())
}

/// The binaries of these tests.
fn built(names: &[&str]) -> Result<Vec<PathBuf>> {
    let mut cargo = cargo();
    // Not --package: see `cargo xtask test`.
    cargo.args(["test", "--workspace", "--no-run", "--message-format", "json"]);
    for name in names {
        cargo.args(["--test", name]);
    }
    let output = cargo.stderr(Stdio::inherit()).output().context("cannot start cargo")?;
    if !output.status.success() {
        bail!("the tests were not built");
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let find = |name: &&str| executable(&messages, name).with_context(|| format!("cargo does not say where {name} is"));
    names.iter().map(find).collect()
}

/// In cargo's messages, a JSON object a line.
fn executable(messages: &str, name: &str) -> Option<PathBuf> {
    let paths = messages.lines().filter_map(|line| line.split_once(r#""executable":""#)?.1.split('"').next());
    let wanted = format!("{name}-");
    paths
        .map(PathBuf::from)
        .find(|path| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(&wanted)))
}

#[cfg(test)]
mod tests {
    use super::executable;

    #[test]
    fn a_test_binary_is_found_by_its_name() {
        let messages = r#"{"reason":"compiler-artifact","executable":null,"fresh":true}
{"reason":"compiler-artifact","executable":"/t/debug/svc-agent","fresh":true}
{"reason":"compiler-artifact","executable":"/t/debug/deps/packets-0123abcd","fresh":true}"#;
        assert_eq!(executable(messages, "packets").as_deref(), Some("/t/debug/deps/packets-0123abcd".as_ref()));
        assert_eq!(executable(messages, "verifier"), None);
    }
}
