//! The last steps of a container runtime: the root directory, the capabilities, the environment, and then the program.
use std::ffi::CString;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Run a program with this root directory and with no more than these capabilities.
#[derive(clap::Args)]
pub(crate) struct Options {
    #[arg(long)]
    root: PathBuf,
    /// As Kubernetes names them, without CAP_; ALL takes none away.
    #[arg(long, value_delimiter = ',')]
    capabilities: Vec<String>,
    /// Nothing that the program starts gains any.
    #[arg(long)]
    no_new_privileges: bool,
    /// NAME=VALUE; nothing else is in the environment.
    #[arg(long = "env")]
    environment: Vec<String>,
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// Does not return where all goes well.
pub(crate) fn run(options: &Options) -> Result<()> {
    let kept = options.capabilities.iter().map(|name| number(name)).collect::<Result<Vec<_>>>()?;
    let root = CString::new(options.root.as_os_str().as_encoded_bytes())?;
    // SAFETY: the path is a string that ends with a zero and outlives the call.
    if unsafe { libc::chroot(root.as_ptr()) } != 0 {
        return Err(io::Error::last_os_error()).context("cannot change the root directory");
    }
    std::env::set_current_dir("/")?;
    for capability in (0..).take_while(|capability| control(libc::PR_CAPBSET_READ, *capability).is_ok()) {
        if !kept.contains(&Some(capability)) && !kept.contains(&None) {
            control(libc::PR_CAPBSET_DROP, capability).context("cannot drop a capability")?;
        }
    }
    if options.no_new_privileges {
        control(libc::PR_SET_NO_NEW_PRIVS, 1).context("cannot give up new privileges")?;
    }
    let (program, arguments) = options.command.split_first().context("no program")?;
    let environment = options.environment.iter().filter_map(|variable| variable.split_once('='));
    Err(Command::new(program).args(arguments).env_clear().envs(environment).exec())
        .with_context(|| format!("cannot start {program}"))
}

fn control(option: libc::c_int, value: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the options that are used here take numbers only.
    if unsafe { libc::prctl(option, value, 0, 0, 0) } >= 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// None: all of them.
fn number(name: &str) -> Result<Option<libc::c_ulong>> {
    Ok(Some(match name {
        "ALL" => return Ok(None),
        // linux/capability.h
        "NET_ADMIN" => 12,
        "SYS_PTRACE" => 19,
        "SYS_ADMIN" => 21,
        "PERFMON" => 38,
        "BPF" => 39,
        _ => bail!("{name} is a capability that the lab does not know"),
    }))
}
