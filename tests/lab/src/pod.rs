//! Containers of a pod on a node of the lab, as a container runtime starts them: with the pod's arguments, environment, mounts
//! and capabilities, a read-only root directory that holds no more than the image, and a view of no other processes.
//!
//! What is not here: the seccomp filter and the AppArmor profile, which a runtime brings, and a cgroup namespace.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::agent::{log_tail, wait_until_healthy};
use crate::binaries;
use crate::process::Process;
use crate::topology::{Lab, Node};

/// Where the image has the agent.
pub const ENTRYPOINT: &str = "/usr/local/bin/svc-agent";
/// Where a pod finds its service account.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const PATIENCE: Duration = Duration::from_secs(30);

/// `$1` becomes the root directory. Then come the mounts, each by what, where and how, to `--`; then the program.
const SCRIPT: &str = r#"set -e
    root=$1
    shift
    mount --bind "$root" "$root"
    mkdir -p "$root/dev" "$root/proc" "$root/sys"
    for device in null zero full random urandom; do
        : > "$root/dev/$device"
        mount --bind "/dev/$device" "$root/dev/$device"
    done
    mount -t proc proc "$root/proc"
    mount -t sysfs -o ro sysfs "$root/sys"
    while [ "$1" != -- ]; do
        target=$root$2
        if [ -d "$1" ]; then
            mkdir -p "$target"
        else
            mkdir -p "${target%/*}"
            [ -e "$target" ] || : > "$target"
        fi
        mount --rbind "$1" "$target"
        mount --make-r"$4" "$target"
        [ "$3" = rw ] || mount -o remount,bind,ro "$target"
        shift 4
    done
    shift
    mount -o remount,bind,ro "$root"
    exec "$@""#;

/// Where a node of the lab has what a pod mounts.
pub struct Volumes<'a> {
    /// Of the service account: its token among them.
    pub service_account: PathBuf,
    /// The path that stands for a node's path (hostPath), or for a ConfigMap.
    pub place: &'a dyn Fn(&Value) -> Result<PathBuf>,
}

/// A container that runs. Killed when dropped.
pub struct Container {
    process: Process,
    log: PathBuf,
}

impl Container {
    /// Starts the first container of `pod`, a Pod as the API server has it, once each init container has ended well; waits
    /// until it is healthy.
    pub fn start(lab: &Lab, node: &Node, pod: &Value, volumes: &Volumes<'_>) -> Result<Self> {
        for container in pod["spec"]["initContainers"].as_array().into_iter().flatten() {
            let mut init = Self::spawn(lab, node, pod, container, volumes)?;
            let status = init.process.wait()?;
            if !status.success() {
                bail!("the container {} ended with {status}: {}", container["name"], init.log_tail());
            }
        }
        let mut container = Self::spawn(lab, node, pod, &pod["spec"]["containers"][0], volumes)?;
        let Container { process, log } = &mut container;
        wait_until_healthy("the container", process, log, lab.namespace(node.name)?, PATIENCE)?;
        Ok(container)
    }

    /// Starts one container of the pod.
    pub fn spawn(lab: &Lab, node: &Node, pod: &Value, container: &Value, volumes: &Volumes<'_>) -> Result<Self> {
        let name = format!("{}-{}", node.name, container["name"].as_str().context("a container has no name")?);
        let root = lab.directory().join("roots").join(&name);
        fs::create_dir_all(root.join("var"))?;
        // As in the base image.
        if !root.join("var/run").is_symlink() {
            std::os::unix::fs::symlink("/run", root.join("var/run"))?;
        }
        let (log_path, log) = lab.log(&name)?;
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child", "sh", "-c", SCRIPT, "sh"]).arg(&root);
        for (source, target) in image()? {
            command.arg(source).arg(target).args(["ro", "private"]);
        }
        for mount in array(&container["volumeMounts"]) {
            let target = mount["mountPath"].as_str().context("a mount has no path")?;
            let read_only = mount["readOnly"] == true;
            let propagation = match mount["mountPropagation"].as_str() {
                Some("Bidirectional") => "shared",
                Some("HostToContainer") => "slave",
                _ => "private",
            };
            command.arg(source_of(pod, mount, volumes)?).arg(target.replace("/var/run/", "/run/"));
            command.args([if read_only { "ro" } else { "rw" }, propagation]);
        }
        command.arg("--").arg(binaries::lab()?).arg("contain").arg("--root").arg(&root);
        let security = &container["securityContext"];
        let added = array(&security["capabilities"]["add"]).filter_map(Value::as_str);
        let capabilities: Vec<&str> = if security["privileged"] == true { vec!["ALL"] } else { added.collect() };
        command.arg("--capabilities").arg(capabilities.join(","));
        command.args((security["allowPrivilegeEscalation"] == false).then_some("--no-new-privileges"));
        for variable in environment(node, container)? {
            command.arg("--env").arg(variable);
        }
        command.args(["--", ENTRYPOINT]).args(array(&container["args"]).filter_map(Value::as_str));
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        Ok(Container { process: lab.spawn(node.name, command)?, log: log_path })
    }

    /// As the kubelet ends a pod: SIGTERM, and its end is waited for.
    pub fn stop(mut self) -> Result<()> {
        let unshare = self.process.pid();
        let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children"))?;
        let child: i32 = children.trim().parse().context("the container has no process")?;
        // SAFETY: the process is not waited for before its parent, a child of ours, has ended.
        unsafe { libc::kill(child, libc::SIGTERM) };
        let status = self.process.wait()?;
        if !status.success() {
            bail!("the container ended with {status} on SIGTERM; its log: {}", self.log_tail());
        }
        Ok(())
    }

    /// Waits for its end, and returns what it said.
    pub fn finish(mut self) -> Result<String> {
        let status = self.process.wait()?;
        let text = fs::read_to_string(&self.log)?;
        if !status.success() {
            bail!("the container ended with {status}: {text}");
        }
        Ok(text)
    }

    pub fn log_tail(&self) -> String {
        log_tail(&self.log)
    }

    /// All that it has said, and its predecessors.
    pub fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(&self.log)?)
    }
}

fn array(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// The files of the image, by where they are here: the agent, and what the base image has of what it is linked to.
fn image() -> Result<Vec<(PathBuf, String)>> {
    let agent = binaries::agent()?;
    let output = Command::new("ldd").arg(&agent).output().context("cannot start ldd")?;
    let text = String::from_utf8(output.stdout)?;
    let libraries = text.split_whitespace().filter(|word| word.starts_with('/'));
    let files = libraries.map(|library| Ok((fs::canonicalize(library)?, library.to_owned())));
    files.chain([Ok((agent.clone(), ENTRYPOINT.to_owned()))]).collect()
}

fn source_of(pod: &Value, mount: &Value, volumes: &Volumes<'_>) -> Result<PathBuf> {
    if mount["mountPath"] == SERVICE_ACCOUNT {
        return Ok(volumes.service_account.clone());
    }
    let volume = array(&pod["spec"]["volumes"]).find(|volume| volume["name"] == mount["name"]);
    let path = (volumes.place)(volume.with_context(|| format!("the pod has no volume {}", mount["name"]))?)?;
    if !path.exists() {
        bail!("there is no {} for the volume {}", path.display(), mount["name"]);
    }
    Ok(path)
}

/// NAME=VALUE, as the image and the kubelet have it.
fn environment(node: &Node, container: &Value) -> Result<Vec<String>> {
    let mut variables: Vec<String> = ["PATH=/usr/local/bin:/usr/bin:/bin"].map(str::to_owned).into();
    // Of the Service default/kubernetes.
    variables.extend(["KUBERNETES_SERVICE_HOST=10.96.0.1", "KUBERNETES_SERVICE_PORT=443"].map(str::to_owned));
    for variable in array(&container["env"]) {
        let name = variable["name"].as_str().context("a variable has no name")?;
        let value = match variable["valueFrom"]["fieldRef"]["fieldPath"].as_str() {
            Some("spec.nodeName") => node.name,
            Some(other) => bail!("{name} is of the pod's field {other}, which the lab does not know"),
            None => variable["value"].as_str().unwrap_or_default(),
        };
        variables.push(format!("{name}={value}"));
    }
    Ok(variables)
}

/// The path that a hostPath volume asks for.
pub fn host_path(volume: &Value) -> Option<&Path> {
    volume["hostPath"]["path"].as_str().map(Path::new)
}
