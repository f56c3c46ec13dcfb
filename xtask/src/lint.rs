//! Formatting, clippy, and the licences and origins of dependencies.
use std::process::{Command, Stdio};

use anyhow::Result;

use crate::setup;
use crate::step::{cargo, done, shown, step};

/// Check formatting, clippy and dependencies.
#[derive(clap::Args)]
pub(crate) struct Options {}

pub(crate) fn run(_: &Options) -> Result<()> {
    setup::ensure()?;
    check_sources()?;
    check_dependencies()
}

pub(crate) fn check_sources() -> Result<()> {
    shown(cargo().args(["fmt", "--all", "--check"]))?;
    shown(cargo().args(["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"]))
}

fn check_dependencies() -> Result<()> {
    let installed = cargo().args(["deny", "--version"]).stdout(Stdio::null()).stderr(Stdio::null()).status()?.success();
    if !installed {
        step("cargo-deny", cargo().args(["install", "--locked", "cargo-deny"]))?;
    }
    let mut checks = vec!["bans", "licenses", "sources"];
    if advisories_can_be_fetched() {
        checks.push("advisories");
    } else {
        done("advisories", "skipped: the RustSec advisory database cannot be fetched from here");
    }
    shown(cargo().args(["deny", "check"]).args(checks))
}

/// The database is a git repository, which a machine that reaches only package registries does not get.
fn advisories_can_be_fetched() -> bool {
    Command::new("git")
        .args(["ls-remote", "--quiet", "https://github.com/RustSec/advisory-db", "HEAD"])
        .env("GIT_TERMINAL_PROMPT", "0")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}
