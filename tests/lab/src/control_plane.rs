//! A real control plane in the lab: etcd and kube-apiserver on a host of their own. There are no controllers: Services and
//! EndpointSlices are written as they are wanted.
mod binaries;
mod certificates;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use futures::{StreamExt, TryStreamExt};
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams, PostParams,
};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::{Value, json};

use crate::manifests::{Manifests, identity};
use crate::process::Process;
use crate::topology::{CONTROL_PLANE, Lab, SERVICE_CIDRS, lan_v4};

pub use self::binaries::{
    all as binaries, directory as binaries_directory, helm as helm_binary, kube_proxy as kube_proxy_binary,
    kubectl as kubectl_binary, kubernetes_version, promtool as promtool_binary,
};
pub use self::certificates::Authority;

const ADDRESS: std::net::Ipv4Addr = lan_v4(0x02);
/// Another that its certificate is good for, and that the host does not have by itself.
pub const OTHER_ADDRESS: std::net::Ipv4Addr = lan_v4(0x03);
const PORT: u16 = 6443;
const PATIENCE: Duration = Duration::from_secs(90);
/// Requests under way of those that may be.
const AT_ONCE: usize = 16;
/// Of the agents, where they have a token, and its namespace.
const SERVICE_ACCOUNT: &str = "svc-agent";
const NAMESPACE: &str = "kube-system";
/// Whose fields these are, when the API server asks.
const MANAGER: &str = "svc-lab";

pub struct ControlPlane {
    binaries: PathBuf,
    /// Certificates, kubeconfigs and etcd's data.
    directory: PathBuf,
    _etcd: Process,
    api_server: Option<Process>,
    published: Manifests,
    identity: Identity,
    /// How many tokens the agents' service account has had.
    tokens: u32,
}

/// How an agent is told where the API server is, and who it is itself.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    /// A kubeconfig with a certificate.
    Certificate,
    /// As kubeadm tells kube-proxy: a configuration file, which names a kubeconfig, which names a file with a token.
    Configuration,
    /// As the kubelet tells a pod: by its environment, and files in a known place.
    Pod,
}

impl ControlPlane {
    pub fn start(lab: &mut Lab) -> Result<Self> {
        let binaries = binaries::directory()?;
        lab.add_control_plane_host()?;
        let directory = lab.directory().join("control-plane");
        certificates::write(&directory, &[ADDRESS, OTHER_ADDRESS])?;
        for user in [certificates::ADMIN, certificates::AGENT] {
            write_kubeconfig(&directory, user)?;
        }
        let etcd = start_etcd(lab, &binaries, &directory)?;
        let published = Manifests::default();
        let mut control_plane = ControlPlane {
            binaries,
            directory,
            _etcd: etcd,
            api_server: None,
            published,
            identity: Identity::Certificate,
            tokens: 0,
        };
        control_plane.start_api_server(lab)?;
        Ok(control_plane)
    }

    /// For the agent: what kube-proxy may, and no more.
    pub fn agent_kubeconfig(&self) -> PathBuf {
        kubeconfig(&self.directory, certificates::AGENT)
    }

    /// The arguments that tell an agent of the API server.
    pub fn agent_arguments(&self) -> Vec<String> {
        match self.identity {
            Identity::Certificate => vec!["--kubeconfig".to_owned(), self.agent_kubeconfig().display().to_string()],
            Identity::Configuration => vec!["--config".to_owned(), self.configuration().display().to_string()],
            Identity::Pod => vec![],
        }
    }

    /// Where an agent is to be in a pod: the files that it finds there, and the environment.
    pub fn pod(&self) -> Option<(PathBuf, [(&'static str, &'static str); 2])> {
        let environment = [("KUBERNETES_SERVICE_HOST", "10.96.0.1"), ("KUBERNETES_SERVICE_PORT", "443")];
        (self.identity == Identity::Pod).then(|| (self.service_account(), environment))
    }

    fn configuration(&self) -> PathBuf {
        self.directory.join("kube-proxy.yaml")
    }

    fn service_account(&self) -> PathBuf {
        self.directory.join("serviceaccount")
    }

    /// Gives the agents that start from now on a service account with a token instead of a certificate.
    pub fn use_tokens(&mut self, lab: &Lab, identity: Identity) -> Result<()> {
        let account = json!({
            "apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": { "name": SERVICE_ACCOUNT, "namespace": NAMESPACE },
        });
        // Kube-proxy's role, which the API server makes at its first start.
        let binding = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
            "metadata": { "name": SERVICE_ACCOUNT },
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:node-proxier" },
            "subjects": [{ "kind": "ServiceAccount", "name": SERVICE_ACCOUNT, "namespace": NAMESPACE }],
        });
        self.with_client(lab, async |client| {
            apply(&client, &account).await?;
            apply(&client, &binding).await
        })?;
        let token = self.pod_files(lab)?.join("token").display().to_string();
        write_user(&self.directory, SERVICE_ACCOUNT, &json!({ "tokenFile": token }))?;
        let configuration = json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration", "mode": "iptables",
            "clientConnection": { "kubeconfig": kubeconfig(&self.directory, SERVICE_ACCOUNT) },
            "conntrack": { "maxPerCore": 0 },
        });
        fs::write(self.configuration(), configuration.to_string())?;
        self.identity = identity;
        Ok(())
    }

    /// The directory with what a pod of the service account, which has to be there, finds in it.
    pub fn pod_files(&mut self, lab: &Lab) -> Result<PathBuf> {
        let files = self.service_account();
        fs::create_dir_all(&files)?;
        fs::write(files.join("namespace"), NAMESPACE)?;
        fs::copy(self.directory.join("ca.crt"), files.join("ca.crt"))?;
        self.replace_token(lab)?;
        Ok(files)
    }

    /// Writes another token into the file, and then revokes the one that was there.
    pub fn replace_token(&mut self, lab: &Lab) -> Result<()> {
        let name = |number: u32| format!("{SERVICE_ACCOUNT}-{number}");
        // A token is good for as long as the object that it is bound to is there.
        let secret = |name: String| {
            let metadata = json!({ "name": name, "namespace": NAMESPACE });
            json!({ "apiVersion": "v1", "kind": "Secret", "metadata": metadata })
        };
        let (old, new) = (self.tokens, self.tokens + 1);
        let file = self.service_account().join("token");
        self.with_client(lab, async |client| {
            apply(&client, &secret(name(new))).await?;
            let request = json!({
                "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
                "spec": { "boundObjectRef": { "apiVersion": "v1", "kind": "Secret", "name": name(new) } },
            });
            let path = format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{SERVICE_ACCOUNT}/token");
            let request = axum::http::Request::post(path)
                .header("content-type", "application/json")
                .body(serde_json::to_vec(&request)?)?;
            let answer: Value = client.request(request).await?;
            fs::write(&file, answer["status"]["token"].as_str().context("the answer has no token")?)?;
            if old > 0 {
                delete(&client, &secret(name(old))).await?;
            }
            Ok(())
        })?;
        self.tokens = new;
        Ok(())
    }

    pub fn admin_kubeconfig(&self) -> PathBuf {
        kubeconfig(&self.directory, certificates::ADMIN)
    }

    /// What kubectl says, as the administrator. Warnings count as errors.
    pub fn kubectl(&self, lab: &Lab, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(kubectl_binary()?);
        command.arg("--warnings-as-errors").args(arguments);
        self.administer(lab, command)
    }

    /// What helm says, as the administrator.
    pub fn helm(&self, lab: &Lab, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(helm_binary()?);
        command.args(arguments);
        self.administer(lab, command)
    }

    fn administer(&self, lab: &Lab, mut command: Command) -> Result<String> {
        command
            .env("KUBECONFIG", self.admin_kubeconfig())
            .env("HOME", &self.directory)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let shown = format!("{command:?}");
        let mut process = lab.spawn(CONTROL_PLANE, command)?;
        let output = process.output()?;
        if !output.status.success() {
            bail!("{shown} ended with {}: {}", output.status, text(&output.stderr).trim());
        }
        Ok(text(&output.stdout))
    }

    /// What the agents' service account has asked of the API server: verb, group, resource, and the answer's code.
    pub fn requests(&self) -> Result<Vec<[String; 4]>> {
        let log = fs::read_to_string(self.audit_log())?;
        let events = log.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?;
        let word = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let requests = events.iter().filter(|event| event["objectRef"].is_object()).map(|event| {
            let group = event["objectRef"]["apiGroup"].as_str().unwrap_or_default().to_owned();
            let resource = word(&event["objectRef"]["resource"]);
            [word(&event["verb"]), group, resource, word(&event["responseStatus"]["code"])]
        });
        Ok(requests.collect())
    }

    fn audit_log(&self) -> PathBuf {
        self.directory.join("audit.log")
    }

    /// SIGKILL; etcd goes on.
    pub fn kill_api_server(&mut self) {
        self.api_server = None;
    }

    /// Starts it, and waits until it is ready.
    pub fn start_api_server(&mut self, lab: &Lab) -> Result<()> {
        let file = |name: &str| self.directory.join(name).display().to_string();
        fs::write(self.directory.join("audit-policy.json"), audit_policy().to_string())?;
        let (log_path, log) = lab.log("kube-apiserver")?;
        let mut command = Command::new(self.binaries.join("kube-apiserver"));
        command
            .arg("--etcd-servers=http://127.0.0.1:2379")
            .args([format!("--advertise-address={ADDRESS}"), format!("--secure-port={PORT}")])
            .arg(format!("--service-cluster-ip-range={SERVICE_CIDRS}"))
            .args(["--authorization-mode=Node,RBAC", "--allow-privileged=true"])
            .arg(format!("--audit-policy-file={}", file("audit-policy.json")))
            .arg(format!("--audit-log-path={}", self.audit_log().display()))
            .arg(format!("--client-ca-file={}", file("ca.crt")))
            .arg(format!("--tls-cert-file={}", file("server.crt")))
            .arg(format!("--tls-private-key-file={}", file("server.key")))
            .arg("--service-account-issuer=https://kubernetes.default.svc")
            .arg(format!("--service-account-key-file={}", file("service-accounts.pub")))
            .arg(format!("--service-account-signing-key-file={}", file("service-accounts.key")))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let mut api_server = lab.spawn(CONTROL_PLANE, command)?;
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = self.with_client(lab, readyz) {
            if let Some(status) = api_server.ended() {
                bail!("kube-apiserver ended with {status}: {}", tail(&log_path));
            }
            if Instant::now() > deadline {
                bail!("kube-apiserver is not ready after {} s: {error:#}", PATIENCE.as_secs());
            }
            thread::sleep(Duration::from_millis(50));
        }
        self.api_server = Some(api_server);
        Ok(())
    }

    /// Makes the objects that were published before these.
    pub fn publish(&mut self, lab: &Lab, manifests: &Manifests) -> Result<()> {
        let changed: Vec<&Value> =
            manifests.objects().filter(|object| !self.published.objects().any(|before| before == *object)).collect();
        let wanted: Vec<(String, String)> = manifests.objects().map(identity).collect();
        let gone: Vec<&Value> = self.published.objects().filter(|object| !wanted.contains(&identity(object))).collect();
        self.with_client(lab, async |client| {
            for object in gone {
                delete(&client, object).await?;
            }
            for object in changed {
                apply(&client, object).await?;
            }
            Ok(())
        })?;
        self.published = manifests.clone();
        Ok(())
    }

    /// Makes many objects that are not there yet, several at once.
    pub fn create(&self, lab: &Lab, objects: &[Value]) -> Result<()> {
        self.with_client(lab, async |client| {
            let requests = objects.iter().map(|object| create(&client, object));
            futures::stream::iter(requests).buffer_unordered(AT_ONCE).try_collect().await
        })
    }

    /// What the API server answers to a GET of this path in one of these types: the type that it has chosen, and the body.
    pub fn get(&self, lab: &Lab, path: &str, accept: &str) -> Result<(String, Vec<u8>)> {
        self.with_client(lab, async |client| {
            let request = axum::http::Request::get(path).header("accept", accept).body(kube::client::Body::empty())?;
            let answer = client.send(request).await?;
            let kind = answer.headers().get("content-type").context("the answer has no content-type")?.to_str()?;
            Ok((kind.to_owned(), answer.into_body().collect_bytes().await?.into()))
        })
    }

    /// Reason and note of each Event of the agents on a Service of the namespace `default`. The API server writes some as well,
    /// where its check of ClusterIPs meets one that is just being made.
    pub fn events(&self, lab: &Lab, service: &str) -> Result<Vec<(String, String)>> {
        let list = self.with_client(lab, async |client| {
            let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("events.k8s.io", "v1", "Event"));
            let api: Api<DynamicObject> = Api::namespaced_with(client, "default", &resource);
            Ok(api.list(&ListParams::default()).await?.items)
        })?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let of_service = list.iter().map(|event| &event.data).filter(|event| event["regarding"]["name"] == service);
        let of_agents = of_service.filter(|event| event["reportingController"] == "svc-agent");
        Ok(of_agents.map(|event| (text(&event["reason"]), text(&event["note"]))).collect())
    }

    /// From the control plane's own host: the machine's other networks know no way to it.
    pub fn with_client<T: Send>(&self, lab: &Lab, work: impl AsyncFnOnce(Client) -> Result<T> + Send) -> Result<T> {
        let path = self.admin_kubeconfig();
        lab.namespace(CONTROL_PLANE)?.inside(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let kubeconfig = Kubeconfig::read_from(path)?;
                let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
                work(Client::try_from(config)?).await
            })
        })
    }
}

/// What the agents ask, as far as they have a token.
fn audit_policy() -> Value {
    let agent = format!("system:serviceaccount:{NAMESPACE}:{SERVICE_ACCOUNT}");
    json!({
        "apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"],
        "rules": [{ "level": "Metadata", "users": [agent] }, { "level": "None" }],
    })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

async fn readyz(client: Client) -> Result<()> {
    client.request_text(axum::http::Request::get("/readyz").body(Vec::new())?).await?;
    Ok(())
}

async fn apply(client: &Client, object: &Value) -> Result<()> {
    let (kind, name) = identity(object);
    let mut wanted = object.clone();
    let status = wanted.as_object_mut().and_then(|fields| fields.remove("status"));
    let api = api(client, object)?;
    api.patch(&name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(wanted))
        .await
        .with_context(|| format!("cannot write {kind} {name}"))?;
    // Not applied but merged, as a kubelet does: two addresses of one type would count as one applied twice.
    if let Some(status) = status {
        api.patch_status(&name, &PatchParams::default(), &Patch::Merge(json!({ "status": status })))
            .await
            .with_context(|| format!("cannot write the status of {kind} {name}"))?;
    }
    Ok(())
}

async fn create(client: &Client, object: &Value) -> Result<()> {
    let (kind, name) = identity(object);
    let wanted: DynamicObject = serde_json::from_value(object.clone())?;
    let result = api(client, object)?.create(&PostParams::default(), &wanted).await;
    result.with_context(|| format!("cannot make {kind} {name}"))?;
    Ok(())
}

async fn delete(client: &Client, object: &Value) -> Result<()> {
    let (kind, name) = identity(object);
    let result = api(client, object)?.delete(&name, &DeleteParams::default()).await;
    result.with_context(|| format!("cannot delete {kind} {name}"))?;
    Ok(())
}

/// Where objects of this one's kind and namespace are.
///
/// # Errors
/// Where it does not say what it is.
pub fn api(client: &Client, object: &Value) -> Result<Api<DynamicObject>> {
    let api_version = object["apiVersion"].as_str().context("an object has no apiVersion")?;
    let kind = object["kind"].as_str().context("an object has no kind")?;
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
    Ok(match object["metadata"]["namespace"].as_str() {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None if ["Node", "ClusterRoleBinding"].contains(&kind) => Api::all_with(client.clone(), &resource),
        None => Api::namespaced_with(client.clone(), "default", &resource),
    })
}

fn start_etcd(lab: &Lab, binaries: &Path, directory: &Path) -> Result<Process> {
    let (_, log) = lab.log("etcd")?;
    let mut command = Command::new(binaries.join("etcd"));
    command
        .arg("--data-dir")
        .arg(directory.join("etcd"))
        // The data does not outlive the lab, let alone a power cut.
        .arg("--unsafe-no-fsync")
        .args(["--listen-client-urls", "http://127.0.0.1:2379", "--advertise-client-urls", "http://127.0.0.1:2379"])
        .args(["--listen-peer-urls", "http://127.0.0.1:2380"])
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    let process = lab.spawn(CONTROL_PLANE, command)?;
    lab.wait_for_port(CONTROL_PLANE, 2379)?;
    Ok(process)
}

fn kubeconfig(directory: &Path, user: &str) -> PathBuf {
    directory.join(format!("{user}.kubeconfig"))
}

fn write_kubeconfig(directory: &Path, user: &str) -> Result<()> {
    let file = |name: &str| directory.join(name).display().to_string();
    let certificate = json!({
        "client-certificate": file(&format!("{user}.crt")),
        "client-key": file(&format!("{user}.key")),
    });
    write_user(directory, user, &certificate)
}

fn write_user(directory: &Path, user: &str, credentials: &Value) -> Result<()> {
    let authority = directory.join("ca.crt").display().to_string();
    let server = format!("https://{ADDRESS}:{PORT}");
    let configuration = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{ "name": "lab", "cluster": { "server": server, "certificate-authority": authority } }],
        "users": [{ "name": user, "user": credentials }],
        "contexts": [{ "name": "lab", "context": { "cluster": "lab", "user": user } }],
        "current-context": "lab",
    });
    fs::write(kubeconfig(directory, user), serde_json::to_string_pretty(&configuration)?)?;
    Ok(())
}

fn tail(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(10)..].join("\n")
}
