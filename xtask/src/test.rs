//! Every test there is: those that any machine runs, then those that need root and the kernel.
use std::env;
use std::fs;
use std::process::Command;

use anyhow::Result;
use clap::ValueEnum;

use crate::step::{cargo, root, shown};
use crate::{host, lint, setup};

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
    /// The tests against a real kube-apiserver, which is built with Go.
    ControlPlane,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let control_plane = !options.skip.contains(&Group::ControlPlane);
    host::require_lab()?;
    if control_plane {
        setup::require_go()?;
    }
    setup::ensure()?;
    setup::ensure_lab_tools()?;
    if env::var_os("CI").is_some_and(|value| value == "true") {
        lint::check_sources()?;
    }

    shown(cargo().args(["build", "--workspace"]))?;
    if control_plane {
        shown(lab().arg("control-plane"))?;
    }
    shown(cargo().args(["test", "--workspace", "--exclude", "svc-tests", "--"]).args(&options.filters))?;
    let result = shown(&mut root_tests(control_plane, &options.filters)?);
    // A test that was killed could not tidy up after itself.
    shown(lab().arg("clean"))?;
    result
}

/// A lab is two nodes, each with its agent and a few hundred requests in flight: more labs at once would measure waiting.
fn root_tests(control_plane: bool, filters: &[String]) -> Result<Command> {
    let mut test = cargo();
    test.args(["test", "--package", "svc-tests"]);
    for name in test_binaries()? {
        if control_plane || name != "control_plane" {
            test.args(["--test", &name]);
        }
    }
    test.args(["--", "--test-threads", "2"]).args(filters);
    Ok(test)
}

/// Every file of tests/ but the library is a test binary of its own.
fn test_binaries() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(root().join("tests"))? {
        let name = entry?.file_name();
        if let Some(name) = name.to_str().and_then(|name| name.strip_suffix(".rs"))
            && name != "lib"
        {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn lab() -> Command {
    let mut lab = Command::new(root().join("target/debug/svc-lab"));
    lab.current_dir(root());
    lab
}
