//! Where the programs are that the lab starts.
use std::env;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

/// The agent; `SVC_AGENT` names another one.
pub fn agent() -> Result<PathBuf> {
    find("svc-agent", "SVC_AGENT")
}

/// The lab's own program, with the server and the client; `SVC_LAB` names another one.
pub fn lab() -> Result<PathBuf> {
    find("svc-lab", "SVC_LAB")
}

/// Cargo puts programs beside each other, and test binaries one directory below.
fn find(name: &str, variable: &str) -> Result<PathBuf> {
    if let Some(path) = env::var_os(variable) {
        return Ok(path.into());
    }
    let own = env::current_exe().context("cannot tell the path of this program")?;
    for directory in own.ancestors().skip(1).take(2) {
        let path = directory.join(name);
        if path.is_file() {
            return Ok(path);
        }
    }
    bail!("{name} is not built; run this by `cargo xtask run` or `cargo xtask test`, or set {variable}")
}
