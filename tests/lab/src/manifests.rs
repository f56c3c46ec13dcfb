//! A set of Kubernetes objects, as they stand in files, and the changes that the lab makes to them.
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Objects by the file that holds them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Manifests {
    files: BTreeMap<String, Vec<Value>>,
}

impl Manifests {
    /// The example that is shown and tested.
    pub fn hostnames() -> Result<Self> {
        Self::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/hostnames").as_ref())
    }

    pub fn read(directory: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        let entries = fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "yaml") {
                let text = fs::read_to_string(&path)?;
                let objects = parse(&text).with_context(|| format!("in {}", path.display()))?;
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                files.insert(name, objects);
            }
        }
        Ok(Manifests { files })
    }

    /// Makes the directory's files these. A file is replaced as a whole, and left alone where it says the same already.
    pub fn write(&self, directory: &Path) -> Result<()> {
        fs::create_dir_all(directory)?;
        for (name, objects) in &self.files {
            let documents: Vec<String> = objects.iter().map(serde_saphyr::to_string).collect::<Result<_, _>>()?;
            let text = documents.join("---\n");
            let path = directory.join(name);
            if fs::read_to_string(&path).is_ok_and(|present| present == text) {
                continue;
            }
            let unfinished = directory.join(format!(".{name}.unfinished"));
            fs::write(&unfinished, text)?;
            fs::rename(&unfinished, &path)?;
        }
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            if !self.files.contains_key(entry.file_name().to_string_lossy().as_ref()) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    pub fn objects(&self) -> impl Iterator<Item = &Value> {
        self.files.values().flatten()
    }

    /// Adds an object, or replaces the one of its kind and name.
    pub fn put(&mut self, object: Value) {
        let key = identity(&object);
        self.remove(&key.0, &key.1);
        self.files.entry(format!("{}-{}.yaml", key.0.to_lowercase(), key.1)).or_default().push(object);
    }

    pub fn remove(&mut self, kind: &str, name: &str) {
        for objects in self.files.values_mut() {
            objects.retain(|object| object["kind"] != kind || object["metadata"]["name"] != name);
        }
        self.files.retain(|_, objects| !objects.is_empty());
    }

    /// Takes a pod out of every EndpointSlice, as if it had been deleted.
    pub fn remove_pod(&mut self, pod: &str) {
        for endpoints in self.endpoints() {
            endpoints.retain(|endpoint| endpoint["targetRef"]["name"] != pod);
        }
    }

    /// Sets whether a pod is ready.
    pub fn set_ready(&mut self, pod: &str, ready: bool) {
        for endpoint in self.endpoints().flatten().filter(|endpoint| endpoint["targetRef"]["name"] == pod) {
            endpoint["conditions"] = json!({ "ready": ready, "serving": ready, "terminating": false });
        }
    }

    /// The endpoints of each slice.
    fn endpoints(&mut self) -> impl Iterator<Item = &mut Vec<Value>> {
        let objects = self.files.values_mut().flatten();
        objects.filter(|object| object["kind"] == "EndpointSlice").filter_map(|slice| slice["endpoints"].as_array_mut())
    }
}

/// The documents of a file.
pub fn parse(text: &str) -> Result<Vec<Value>> {
    Ok(serde_saphyr::from_multiple(text)?)
}

/// Kind and name.
pub fn identity(object: &Value) -> (String, String) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    (text(&object["kind"]), text(&object["metadata"]["name"]))
}
