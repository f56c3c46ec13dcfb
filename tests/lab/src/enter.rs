//! A command on a host of a running lab: in its network namespace, and in its cgroup, without which the socket hooks would not
//! see it.
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use svc_lab::{claim, netns};

/// Run a command on a host of the running lab.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Which lab, where several run.
    #[arg(long)]
    lab: Option<String>,
    /// out, node-a, node-b, client, a1, a2, b1, b2 or cp.
    host: String,
    /// A shell if left out.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let id = match &options.lab {
        Some(id) => id.clone(),
        None => only_lab()?,
    };
    let directory = find(&claim::cgroup_directory(&id)?, &options.host)
        .with_context(|| format!("the lab {id} has no host {}", options.host))?;
    let namespace = Path::new(netns::DIRECTORY).join(format!("{}{}", claim::namespace_prefix(&id), options.host));
    netns::enter(&fs::File::open(&namespace).with_context(|| format!("cannot open {}", namespace.display()))?)?;
    fs::write(directory.join("cgroup.procs"), "0").context("cannot enter the host's cgroup")?;

    let shell = std::env::var("SHELL").unwrap_or_else(|_| "/bin/sh".into());
    let mut words = options.command.iter();
    let mut command = Command::new(words.next().unwrap_or(&shell));
    let program = command.get_program().display().to_string();
    Err(command.args(words).exec()).with_context(|| format!("cannot start {program}"))
}

fn only_lab() -> Result<String> {
    let mut labs = claim::running()?;
    match (labs.pop(), labs.is_empty()) {
        (Some(id), true) => Ok(id),
        (None, _) => bail!("no lab is running; start one with `cargo xtask run`"),
        (Some(_), false) => bail!("several labs are running; name one with --lab: {}", claim::running()?.join(" ")),
    }
}

/// Pods' directories are below their nodes'.
fn find(directory: &Path, host: &str) -> Option<PathBuf> {
    let mut directories = fs::read_dir(directory).ok()?.flatten().filter(|entry| entry.path().is_dir());
    directories.find_map(|entry| if entry.file_name() == host { Some(entry.path()) } else { find(&entry.path(), host) })
}
