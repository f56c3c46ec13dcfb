//! svc-agent on a node of the lab.
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::binaries;
use crate::netns::Netns;
use crate::process::Process;
use crate::source::Source;
use crate::topology::{CLUSTER_CIDRS, Lab, Node};

const HEALTHZ_PORT: u16 = 10256;

/// For the agent to say that the kernel knows everything; `SVC_LAB_PATIENCE`, in seconds, is for a slower machine, on which requests
/// may take longer, too.
pub(crate) fn patience() -> Duration {
    let seconds = std::env::var("SVC_LAB_PATIENCE").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(30))
}

pub struct Agent {
    process: Process,
    log: PathBuf,
}

impl Agent {
    /// Starts it, and waits until it says that the kernel knows everything.
    pub fn start(lab: &Lab, node: &Node, source: &Source, arguments: &[&str]) -> Result<Self> {
        let mut agent = Self::spawn(lab, node, source, arguments)?;
        wait_until_healthy("the agent", &mut agent.process, &agent.log, lab.namespace(node.name)?, patience())?;
        Ok(agent)
    }

    fn spawn(lab: &Lab, node: &Node, source: &Source, arguments: &[&str]) -> Result<Self> {
        let (path, log) = lab.log(&format!("agent-{}", node.name))?;
        let pod = match source {
            Source::ControlPlane(control_plane) => control_plane.pod(),
            Source::Directory(_) => None,
        };
        let mut command = match pod {
            Some((files, environment)) => in_pod(&binaries::agent()?, &files, environment),
            None => Command::new(binaries::agent()?),
        };
        command
            .args(["run", "--node-name", node.name, "--cluster-cidr", CLUSTER_CIDRS])
            .args(lab.uplinks().iter().flat_map(|uplink| ["--uplink", uplink]))
            .arg("--cgroup")
            .arg(lab.cgroup(node.name)?)
            .arg("--bpffs")
            .arg(lab.bpffs(node.name))
            .args(source.arguments())
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        Ok(Agent { process: lab.spawn(node.name, command)?, log: path })
    }

    /// SIGKILL: it has no chance to do anything about it.
    pub fn kill(mut self) {
        self.process.kill();
    }

    /// SIGTERM, and waits for its end.
    pub fn stop(mut self) -> Result<()> {
        self.process.signal(libc::SIGTERM)?;
        let status = self.process.wait()?;
        if !status.success() {
            bail!("the agent ended with {status} on SIGTERM; its log: {}", self.log_tail());
        }
        Ok(())
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    /// All that it and its predecessors on this node have written.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn log_tail(&self) -> String {
        log_tail(&self.log)
    }
}

/// The program with a /run of its own, where these files are what the kubelet puts there for a pod with a service account.
fn in_pod(program: &Path, files: &Path, environment: [(&str, &str); 2]) -> Command {
    const SCRIPT: &str = "set -e
        mount --rbind /run/svc-lab /mnt
        mount -t tmpfs tmpfs /run
        mkdir -p /run/svc-lab /run/secrets/kubernetes.io/serviceaccount
        mount --rbind /mnt /run/svc-lab
        mount --bind \"$1\" /run/secrets/kubernetes.io/serviceaccount
        shift
        exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", SCRIPT, "sh"]).arg(files).arg(program).envs(environment);
    command
}

/// Waits until a Service proxy, the agent or kube-proxy, says that the kernel knows everything.
pub(crate) fn wait_until_healthy(
    name: &str,
    process: &mut Process,
    log: &Path,
    namespace: &Netns,
    patience: Duration,
) -> Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(status) = process.ended() {
            bail!("{name} ended with {status}; its log: {}", log_tail(log));
        }
        if namespace.inside(|| Ok(healthz()))?.is_ok_and(|status| status == 200) {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("{name} is not healthy after {} s; its log: {}", patience.as_secs(), log_tail(log));
        }
        thread::sleep(Duration::from_millis(20));
    }
}

pub(crate) fn log_tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    format!("\n{}", lines[lines.len().saturating_sub(20)..].join("\n"))
}

/// The status of the Service proxy's own health on this host, kube-proxy's being at the same place.
fn healthz() -> Result<u16> {
    let mut stream = TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, HEALTHZ_PORT)))?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    answer.split(' ').nth(1).and_then(|status| status.parse().ok()).context("the answer is not HTTP")
}

/// An inspection subcommand of the agent, as a user would type it on the node.
pub fn inspect(lab: &Lab, node: &Node, arguments: &[&str]) -> Result<String> {
    let Output { status, stdout, stderr } = ask(lab, node, arguments)?;
    if !status.success() {
        let errors = String::from_utf8_lossy(&stderr);
        bail!("svc-agent {} ended with {status}: {}", arguments.join(" "), errors.trim());
    }
    Ok(String::from_utf8(stdout)?)
}

/// As [`inspect`], however it ends.
pub fn ask(lab: &Lab, node: &Node, arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(binaries::agent()?);
    command.args(arguments).arg("--bpffs").arg(lab.bpffs(node.name)).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = lab.spawn(node.name, command)?;
    let child = process.child();
    let mut errors = child.stderr.take().context("no standard error")?;
    // Both at once: whichever is full would hold the other up.
    let stderr = thread::spawn(move || {
        let mut bytes = Vec::new();
        errors.read_to_end(&mut bytes).map(|_| bytes)
    });
    let mut stdout = Vec::new();
    child.stdout.take().context("no standard output")?.read_to_end(&mut stdout)?;
    let stderr = stderr.join().map_err(|_| anyhow::anyhow!("reading standard error panicked"))??;
    Ok(Output { status: process.wait()?, stdout, stderr })
}
