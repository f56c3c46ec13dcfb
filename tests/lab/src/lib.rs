//! A lab for svc on one machine: two nodes, their pods and a client outside, in network namespaces and cgroups of their own,
//! with a real HTTP server in every pod. The demonstration and the namespace tests are both driven through it.
pub mod agent;
pub mod binaries;
pub mod cgroup;
pub mod claim;
pub mod client;
pub mod control_plane;
pub mod flood;
pub mod go;
pub mod kube_proxy;
pub mod load;
pub mod manifests;
pub mod netns;
pub mod offload;
pub mod pieces;
pub mod pod;
pub mod probe;
pub mod process;
pub mod server;
pub mod source;
pub mod topology;
pub mod tun;
