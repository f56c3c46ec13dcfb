//! Every test there is: those that any machine runs, then those that need root and the kernel.
use std::env;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::step::{cargo, done, output, program, root, shown};
use crate::{host, lint, setup, vm};

/// Run all tests: the unit tests, then those in the kernel and in network namespaces.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Tests to leave out.
    #[arg(long)]
    skip: Vec<Group>,
    /// Run only tests whose name holds one of these.
    filters: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Group {
    /// The tests against a real kube-apiserver, which is built with Go; those of deploy/ among them.
    ControlPlane,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let control_plane = !options.skip.contains(&Group::ControlPlane);
    host::require_lab()?;
    host::require_space(root())?;
    if control_plane {
        setup::require_go().context("cannot run all tests; --skip control-plane leaves those out that need Go")?;
        setup::ensure_kube_proxy_tools()?;
    }
    setup::ensure()?;
    setup::ensure_lab_tools()?;
    if env::var_os("CI").is_some_and(|value| value == "true") {
        lint::check_sources()?;
    }

    shown(cargo().arg("build"))?;
    if control_plane {
        shown(program("svc-lab")?.arg("control-plane"))?;
    }
    shown(cargo().args(["test", "--"]).args(&options.filters))?;
    // First, so that what is read last is what cargo says of all others.
    let everything = options.filters.is_empty();
    let conformant = if control_plane && everything { conformance() } else { Ok(()) };
    let elsewhere = if everything { vm::run_where_possible() } else { Ok(()) };
    let result = shown(&mut root_tests(control_plane, &options.filters)?);
    let result = result.and(shown(&mut debug_kernel_part(&options.filters)));
    // A test that was killed could not tidy up after itself.
    shown(program("svc-lab")?.arg("clean"))?;
    conformant.and(elsewhere).and(result)
}

/// Where the cluster's programs have been built: that takes half an hour, which no run of the tests has.
fn conformance() -> Result<()> {
    let missing = output(program("svc-cluster")?.arg("missing")).context("cannot ask svc-cluster what it needs")?;
    if !missing.trim().is_empty() {
        done("Kubernetes' own tests", &format!("skipped; {}; `cargo xtask cluster build` builds it", missing.trim()));
        return Ok(());
    }
    setup::ensure_cluster_tools()?;
    shown(program("svc-cluster")?.args(["--name", "ci", "conformance"]))
}

/// A lab is two nodes, each with its agent and a few hundred requests in flight: more labs at once would measure waiting.
fn root_tests(control_plane: bool, filters: &[String]) -> Result<Command> {
    let mut test = cargo();
    // Not --package: with fewer packages cargo would choose other features, and build every dependency once more.
    test.args(["test", "--workspace", "--no-fail-fast"]);
    for name in test_binaries()? {
        if control_plane || !["control_plane", "deploy"].contains(&name.as_str()) {
            test.args(["--test", &name]);
        }
    }
    test.args(["--", "--test-threads", "2"]).args(filters);
    Ok(test)
}

/// The kernel part with its log lines is another object: the verifier's tests once more, on that one.
fn debug_kernel_part(filters: &[String]) -> Command {
    let mut test = cargo();
    test.args(["test", "--workspace", "--features", "svc-tests/kernel-log", "--test", "verifier", "--"]).args(filters);
    test
}

/// As tests/Cargo.toml names them.
fn test_binaries() -> Result<Vec<String>> {
    let manifest = fs::read_to_string(root().join("tests/Cargo.toml")).context("cannot read tests/Cargo.toml")?;
    let tests = manifest.split("[[test]]").skip(1);
    let names = tests.filter_map(|test| test.lines().find_map(|line| line.strip_prefix("name = ")));
    Ok(names.map(|name| name.trim_matches('"').to_owned()).collect())
}
