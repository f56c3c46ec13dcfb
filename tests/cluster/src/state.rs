//! What there is of a cluster on this machine, and its end.
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use svc_lab::control_plane::kubectl_binary;
use svc_lab::netns::{self, Netns};
use svc_lab::{cgroup, go};

use crate::hierarchies;
use crate::network::CONTROL_PLANE;

/// By name. Everything of it carries the name: network namespaces `svc-cluster-NAME-HOST`, cgroups `svc-cluster-NAME/HOST`, and
/// one directory below the cache.
pub(crate) struct Cluster {
    name: String,
    directory: PathBuf,
}

impl Cluster {
    pub(crate) fn named(name: &str) -> Result<Self> {
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric()) {
            bail!("a cluster's name is letters and digits, and not {name:?}");
        }
        Ok(Cluster { name: name.to_owned(), directory: go::cache()?.join("cluster/run").join(name) })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// For files, gone with the cluster. Not below /run: a node's containers are kept here.
    pub(crate) fn directory(&self) -> PathBuf {
        self.directory.clone()
    }

    /// A node's.
    pub(crate) fn node_directory(&self, node: &str) -> PathBuf {
        self.directory.join(node)
    }

    /// The log of a program of a host.
    pub(crate) fn log(&self, host: &str, program: &str) -> PathBuf {
        self.directory.join(host).join(format!("{program}.log"))
    }

    pub(crate) fn namespace_name(&self, host: &str) -> String {
        format!("svc-cluster-{}-{host}", self.name)
    }

    pub(crate) fn namespace(&self, host: &str) -> Netns {
        Netns::existing(self.namespace_name(host))
    }

    /// A host's, in each hierarchy.
    pub(crate) fn cgroup(&self, host: &str) -> String {
        format!("svc-cluster-{}/{host}", self.name)
    }

    /// A file that is there while the cluster is.
    pub(crate) fn mark(&self) -> PathBuf {
        self.directory.join("up")
    }

    /// Waits for its turn, where the same cluster is tried by several at once.
    pub(crate) fn lock(&self) -> Result<File> {
        let path = self.directory.with_extension("lock");
        fs::create_dir_all(path.parent().unwrap_or(&self.directory))?;
        let lock = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        lock.lock()?;
        Ok(lock)
    }

    /// Fails where there is none.
    pub(crate) fn require_up(&self) -> Result<()> {
        if self.mark().exists() {
            return Ok(());
        }
        bail!("there is no cluster {}: start one by `cargo xtask cluster up`", self.name)
    }

    /// A command on a host that is nothing but a network namespace.
    pub(crate) fn command(&self, host: &str, program: impl Into<PathBuf>) -> Result<Command> {
        use std::os::unix::process::CommandExt as _;

        let mut command = Command::new(program.into());
        let namespace = self.namespace(host).open()?;
        let directory = cgroup::mount_point()?.join(self.cgroup(host));
        fs::create_dir_all(&directory)?;
        hierarchies::join(&mut command, vec![directory])?;
        // SAFETY: between fork and exec it is one system call, on a descriptor opened before.
        unsafe {
            command.pre_exec(move || netns::enter(&namespace));
        }
        Ok(command)
    }

    /// kubectl, as the administrator.
    pub(crate) fn kubectl(&self) -> Result<Command> {
        let mut kubectl = self.command(CONTROL_PLANE, kubectl_binary()?)?;
        kubectl.env("KUBECONFIG", self.kubeconfig("admin")).env("HOME", &self.directory);
        Ok(kubectl)
    }

    /// What kubectl says.
    pub(crate) fn ask(&self, arguments: &[&str]) -> Result<String> {
        let output = self.kubectl()?.args(arguments).stdin(Stdio::null()).output().context("cannot start kubectl")?;
        if !output.status.success() {
            bail!("kubectl {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Makes these objects, or changes them.
    pub(crate) fn apply(&self, objects: &[Value]) -> Result<()> {
        let file = self.directory.join("objects.json");
        let list = serde_json::json!({ "apiVersion": "v1", "kind": "List", "items": objects });
        fs::write(&file, list.to_string())?;
        self.ask(&["apply", "-f", &file.display().to_string()]).map(drop)
    }

    /// A user's.
    pub(crate) fn kubeconfig(&self, user: &str) -> PathBuf {
        self.directory.join("pki").join(format!("{user}.kubeconfig"))
    }

    /// Ends all processes, and removes what is there of the cluster. Where there is nothing, it does nothing.
    pub(crate) fn down(&self) -> Result<()> {
        let directory = format!("svc-cluster-{}", self.name);
        let mut hierarchies = hierarchies::all()?;
        // By version 2 everything is ended, which leaves the others empty.
        hierarchies.sort_by_key(|hierarchy| !hierarchy.is_version_2());
        for hierarchy in hierarchies {
            hierarchy.remove(&directory)?;
        }
        netns::remove_all(&self.namespace_name(""))?;
        match fs::remove_dir_all(&self.directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", self.directory.display()))
            }
            _ => Ok(()),
        }
    }
}
