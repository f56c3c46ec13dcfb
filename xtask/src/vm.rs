//! The tests on other kernels: Debian's, started in a virtual machine whose whole file system is an archive in memory.
mod archive;
mod guest;
mod kernel;

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::setup;
use crate::step::{announce, cargo, root, shown};
use guest::Guest;

/// Load the programs and run packets and traffic through them on other kernels, in virtual machines.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Series of kernels, as Debian has them.
    #[arg(default_values = ["6.1", "6.12"])]
    versions: Vec<String>,
    /// Tests of tests/namespaces.rs to run: those whose name holds one of these.
    #[arg(long = "namespaces", value_name = "FILTER", default_values = NAMESPACE_TESTS)]
    filters: Vec<String>,
    /// For each kernel, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 900)]
    timeout: u64,
}

/// Each way of attaching with traffic on it. All of them would take an hour: nothing runs natively in there.
const NAMESPACE_TESTS: [&str; 4] = [
    "every_backend_answers::case_01_pod_to_cluster_ip",
    "every_backend_answers::case_21_large_answer_to_the_outside",
    "every_backend_answers_with_no_socket_translated::case_1_pod_to_cluster_ip",
    "cleanup_leaves_nothing",
];

pub(crate) fn run(options: &Options) -> Result<()> {
    setup::ensure()?;
    setup::ensure_lab_tools()?;
    setup::ensure_vm_tools()?;
    shown(cargo().arg("build"))?;

    let directory = root().join("target/xtask/vm");
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    if !options.versions.iter().all(|version| kernel::is_kept(&directory, version)) {
        setup::package_lists()?;
    }
    let filters: Vec<&str> = options.filters.iter().map(String::as_str).collect();
    let tests = [("verifier", vec!["--nocapture"]), ("packets", vec![]), ("namespaces", filters)];
    let binaries = built(&tests.each_ref().map(|(name, _)| *name))?;
    let mut guest = Guest::new(&directory)?;
    for ((name, arguments), binary) in tests.iter().zip(&binaries) {
        guest.add_test(name, binary, arguments)?;
    }
    let mut failed = Vec::new();
    for version in &options.versions {
        let kernel = kernel::ensure(&directory, version)?;
        announce_line(&format!("Linux {}", kernel.release));
        if let Err(error) = guest.run(&kernel, Duration::from_secs(options.timeout)) {
            println!("  Linux {}: {error:#}", kernel.release);
            failed.push(kernel.release);
        }
    }
    if !failed.is_empty() {
        bail!("not all is well on Linux {}", failed.join(", "));
    }
    Ok(())
}

fn announce_line(text: &str) {
    announce(text);
    println!();
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
