//! svc installed on the lab's cluster by its own manifests: everything is sent to the real API server, and a pod runs on each
//! node as the API server has it.
use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};
use svc_lab::pod::{Container, Volumes, host_path};
use svc_lab::topology::{Lab, NODES, Node};
use svc_tests::cluster::Cluster;

/// Below deploy/.
pub(crate) fn path(name: &str) -> String {
    format!("{}/../deploy/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// The first object of this kind.
pub(crate) fn find<'a>(objects: &'a [Value], kind: &str) -> &'a Value {
    objects.iter().find(|object| object["kind"] == kind).unwrap_or_else(|| panic!("no {kind}"))
}

/// The items of a list; none where there is no list.
pub(crate) fn all(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

pub(crate) struct Installed {
    /// By the order of the nodes.
    pub(crate) containers: Vec<Container>,
    /// What the pods are made of.
    pub(crate) objects: Vec<Value>,
    pub(crate) cluster: Cluster,
}

impl Installed {
    /// `objects` in the cluster, and a pod of the DaemonSet on each node.
    pub(crate) fn new(objects: Vec<Value>) -> Self {
        Self::on(Cluster::without_agents(), objects)
    }

    pub(crate) fn on(cluster: Cluster, objects: Vec<Value>) -> Self {
        let mut installed = Installed { containers: Vec::new(), objects, cluster };
        // As the controllers make it in each namespace.
        let account = json!({
            "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": "default", "namespace": "kube-system" },
        });
        installed.objects.push(account);
        installed.apply();
        for node in &NODES {
            let container = installed.start(node);
            installed.containers.push(container);
        }
        installed
    }

    /// Sends the objects to the API server.
    pub(crate) fn apply(&mut self) {
        let file = self.file("objects.json");
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": self.objects });
        fs::write(&file, list.to_string()).unwrap();
        let (control_plane, lab) = self.cluster.control_plane();
        control_plane.kubectl(lab, &["apply", "-f", file.to_str().unwrap()]).unwrap();
    }

    /// The pod of a DaemonSet on this node, as the API server takes it.
    fn pod(&mut self, node: &Node, daemon_set: &Value) -> Value {
        let mut pod = daemon_set["spec"]["template"].clone();
        pod["apiVersion"] = "v1".into();
        pod["kind"] = "Pod".into();
        pod["metadata"]["name"] = format!("{}-{}", daemon_set["metadata"]["name"].as_str().unwrap(), node.name).into();
        pod["metadata"]["namespace"] = daemon_set["metadata"]["namespace"].clone();
        pod["spec"]["nodeName"] = node.name.into();
        let file = self.file("pod.json");
        fs::write(&file, pod.to_string()).unwrap();
        let (control_plane, lab) = self.cluster.control_plane();
        let arguments = ["create", "--dry-run=server", "-o", "json", "-f", file.to_str().unwrap()];
        serde_json::from_str(&control_plane.kubectl(lab, &arguments).unwrap()).unwrap()
    }

    /// Runs the pod of the DaemonSet on this node.
    pub(crate) fn start(&mut self, node: &Node) -> Container {
        let daemon_set = find(&self.objects, "DaemonSet").clone();
        let pod = self.pod(node, &daemon_set);
        self.with_volumes(node, |lab, volumes| Container::start(lab, node, &pod, volumes).unwrap())
    }

    /// What the first init container of this DaemonSet says on a node, once it has ended.
    pub(crate) fn initialise(&mut self, node: &Node, daemon_set: &Value) -> String {
        let pod = self.pod(node, daemon_set);
        let container = &pod["spec"]["initContainers"][0];
        self.with_volumes(node, |lab, volumes| {
            Container::spawn(lab, node, &pod, container, volumes).unwrap().finish().unwrap()
        })
    }

    fn with_volumes<T>(&mut self, node: &Node, work: impl FnOnce(&Lab, &Volumes<'_>) -> T) -> T {
        let service_account = {
            let (control_plane, lab) = self.cluster.control_plane();
            control_plane.pod_files(lab).unwrap()
        };
        let lab = &self.cluster.lab;
        let kubelet = self.file("kubelet.conf");
        fs::write(&kubelet, kubelet_kubeconfig()).unwrap();
        let kube_proxy = self.file("kube-proxy-configmap");
        fs::create_dir_all(&kube_proxy).unwrap();
        fs::write(kube_proxy.join("config.conf"), KUBE_PROXY_CONFIG).unwrap();
        fs::write(kube_proxy.join("kubeconfig.conf"), kube_proxy_kubeconfig()).unwrap();
        let place = |volume: &Value| {
            if volume["configMap"]["name"] == "kube-proxy" {
                return Ok(kube_proxy.clone());
            }
            Ok(match host_path(volume).and_then(|path| path.to_str()) {
                Some("/sys/fs/bpf") => lab.bpffs(node.name),
                Some("/sys/fs/cgroup") => lab.cgroup(node.name)?,
                Some("/run/netns") => "/run/netns".into(),
                Some("/etc/kubernetes/kubelet.conf") => kubelet.clone(),
                _ => panic!("the lab has nothing for the volume {volume}"),
            })
        };
        fs::create_dir_all(lab.bpffs(node.name)).unwrap();
        work(lab, &Volumes { service_account, place: &place })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.cluster.lab.directory().join(name)
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for container in &self.containers {
                eprintln!("an agent: {}\n", container.log_tail());
            }
        }
    }
}

/// As kubeadm writes it, but for the credentials, which are the kubelet's own business.
fn kubelet_kubeconfig() -> String {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "node",
        "clusters": [{ "name": "kubernetes", "cluster": { "server": "https://172.31.0.2:6443" } }],
        "contexts": [{ "name": "node", "context": { "cluster": "kubernetes", "user": "node" } }],
        "users": [{ "name": "node", "user": { "client-certificate": "/var/lib/kubelet/pki/kubelet-client-current.pem" } }],
    })
    .to_string()
}

/// As kubeadm writes both into the ConfigMap kube-proxy.
const KUBE_PROXY_CONFIG: &str = r#"apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: ""
  burst: 0
  contentType: ""
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
  qps: 0
clusterCIDR: 10.244.0.0/16,fd00:10:244::/56
configSyncPeriod: 0s
conntrack:
  maxPerCore: null
  min: null
  tcpBeLiberal: false
  tcpCloseWaitTimeout: null
  tcpEstablishedTimeout: null
  udpStreamTimeout: 0s
  udpTimeout: 0s
detectLocal:
  bridgeInterface: ""
  interfaceNamePrefix: ""
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables:
  localhostNodePorts: null
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
kind: KubeProxyConfiguration
logging:
  flushFrequency: 0
  options:
    json:
      infoBufferSize: "0"
    text:
      infoBufferSize: "0"
  verbosity: 0
metricsBindAddress: ""
mode: ""
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
"#;

fn kube_proxy_kubeconfig() -> String {
    const FILES: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "default",
        "clusters": [{ "name": "default", "cluster": {
            "certificate-authority": format!("{FILES}/ca.crt"), "server": "https://172.31.0.2:6443",
        } }],
        "contexts": [{ "name": "default", "context": { "cluster": "default", "namespace": "default", "user": "default" } }],
        "users": [{ "name": "default", "user": { "tokenFile": format!("{FILES}/token") } }],
    })
    .to_string()
}
