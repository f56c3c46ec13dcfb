//! The agent: keeps the kernel's maps equal to what the Kubernetes API, or a folder of manifests, says.
pub mod dataplane;
