//! etcd, kube-apiserver, kube-controller-manager and kube-scheduler, on a host of their own.
use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::json;
use svc_lab::control_plane::Authority;

use crate::network::{API_SERVER, CONTROL_PLANE, NODES, POD_CIDRS, SERVICE_CIDRS};
use crate::programs::Programs;
use crate::state::Cluster;

const PATIENCE: Duration = Duration::from_secs(300);

/// Starts all, and waits until the API server is ready.
pub(crate) fn start(cluster: &Cluster, programs: &Programs) -> Result<()> {
    let pki = cluster.directory().join("pki");
    write_credentials(cluster, &pki)?;
    let file = |name: &str| pki.join(name).display().to_string();

    let data = cluster.directory().join("etcd").display().to_string();
    let mut etcd = cluster.command(CONTROL_PLANE, programs.control_plane("etcd"))?;
    etcd.args(["--data-dir", &data])
        // The data does not outlive the cluster, let alone a power cut.
        .arg("--unsafe-no-fsync")
        .args(["--listen-client-urls", "http://127.0.0.1:2379", "--advertise-client-urls", "http://127.0.0.1:2379"])
        .args(["--listen-peer-urls", "http://127.0.0.1:2380"]);
    spawn(cluster, "etcd", etcd)?;

    let mut api_server = cluster.command(CONTROL_PLANE, programs.control_plane("kube-apiserver"))?;
    api_server
        .arg("--etcd-servers=http://127.0.0.1:2379")
        .args([format!("--advertise-address={API_SERVER}"), format!("--service-cluster-ip-range={SERVICE_CIDRS}")])
        .args(["--allow-privileged", "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction"])
        .arg(format!("--client-ca-file={}", file("ca.crt")))
        .arg(format!("--tls-cert-file={}", file("server.crt")))
        .arg(format!("--tls-private-key-file={}", file("server.key")))
        .arg(format!("--kubelet-client-certificate={}", file("admin.crt")))
        .arg(format!("--kubelet-client-key={}", file("admin.key")))
        .arg("--kubelet-preferred-address-types=InternalIP")
        .arg("--service-account-issuer=https://kubernetes.default.svc")
        .arg(format!("--service-account-key-file={}", file("service-accounts.pub")))
        .arg(format!("--service-account-signing-key-file={}", file("service-accounts.key")));
    let mut api_server = spawn(cluster, "kube-apiserver", api_server)?;

    for (name, more) in [
        (
            "kube-controller-manager",
            vec![
                "--use-service-account-credentials".to_owned(),
                format!("--service-account-private-key-file={}", file("service-accounts.key")),
                format!("--root-ca-file={}", file("ca.crt")),
                format!("--cluster-cidr={POD_CIDRS}"),
                format!("--service-cluster-ip-range={SERVICE_CIDRS}"),
            ],
        ),
        ("kube-scheduler", vec![]),
    ] {
        let user = cluster.kubeconfig(name).display().to_string();
        let mut program = cluster.command(CONTROL_PLANE, programs.built(name))?;
        program.arg("--leader-elect=false").args(more);
        program.args(
            ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"]
                .map(|flag| format!("--{flag}={user}")),
        );
        // They end where the API server is not there yet.
        wait_until(cluster, &mut api_server)?;
        spawn(cluster, name, program)?;
    }
    Ok(())
}

fn wait_until(cluster: &Cluster, api_server: &mut Child) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = cluster.ask(&["get", "--raw", "/readyz"]) {
        let log = cluster.log(CONTROL_PLANE, "kube-apiserver");
        if let Some(status) = api_server.try_wait()? {
            bail!("kube-apiserver ended with {status}: {}", log.display());
        }
        if Instant::now() > deadline {
            bail!("kube-apiserver is not ready after {} s: {error:#}; {}", PATIENCE.as_secs(), log.display());
        }
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// It goes on when this program ends.
fn spawn(cluster: &Cluster, name: &str, mut command: Command) -> Result<Child> {
    use std::os::unix::process::CommandExt as _;

    let path = cluster.log(CONTROL_PLANE, name);
    fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
    let log = File::create(path)?;
    // A group of its own: Ctrl-C is not for it.
    Ok(command.process_group(0).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?)
}

fn write_credentials(cluster: &Cluster, pki: &Path) -> Result<()> {
    let authority = Authority::new(pki)?;
    authority.server(&[API_SERVER])?;
    let mut users = vec![
        ("admin".to_owned(), "admin".to_owned(), Some("system:masters")),
        ("kube-controller-manager".to_owned(), "system:kube-controller-manager".to_owned(), None),
        ("kube-scheduler".to_owned(), "system:kube-scheduler".to_owned(), None),
    ];
    users.extend(NODES.map(|node| (node.to_owned(), format!("system:node:{node}"), Some("system:nodes"))));
    for (file, user, group) in users {
        authority.client(&file, &user, group)?;
        let path = |name: String| pki.join(name).display().to_string();
        let configuration = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "svc",
            "clusters": [{ "name": "svc", "cluster": {
                "server": format!("https://{API_SERVER}:6443"), "certificate-authority": path("ca.crt".to_owned()),
            } }],
            "users": [{ "name": file, "user": {
                "client-certificate": path(format!("{file}.crt")), "client-key": path(format!("{file}.key")),
            } }],
            "contexts": [{ "name": "svc", "context": { "cluster": "svc", "user": file } }],
        });
        fs::write(cluster.kubeconfig(&file), serde_json::to_string_pretty(&configuration)?)?;
    }
    Ok(())
}
