//! A directory of manifests in the place of an API server: every `*.yaml` and `*.yml` in it, read again when it changes.
use std::collections::BTreeMap;
use std::fmt;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecursiveMode, Watcher as _};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::{Event, Sender, decode, send, wire};
use crate::object::{Node, ObjectName, Service, ServiceCidr, Slice};
use crate::status::Status;

/// A burst of changes is over when nothing has happened for this long.
const QUIET: Duration = Duration::from_millis(20);
/// The directory is looked at this often in any case: some file systems notify of nothing.
const REREAD: Duration = Duration::from_secs(30);

/// What a file, or all of them, ask for.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Objects {
    pub services: Vec<Service>,
    pub slices: Vec<Slice>,
    pub nodes: Vec<Node>,
    pub service_cidrs: Vec<ServiceCidr>,
}

/// What is wrong with a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    /// From 1; where the document begins, if nothing closer is known.
    pub line: u64,
    /// Kind and name, as far as they could be read.
    pub object: Option<String>,
    pub problem: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.object {
            Some(object) => write!(f, "line {}: {object}: {}", self.line, self.problem),
            None => write!(f, "line {}: {}", self.line, self.problem),
        }
    }
}

impl std::error::Error for Fault {}

/// Sends what the directory holds, and again whenever that changes, until nobody listens any more.
///
/// # Errors
/// Where the directory cannot be read or watched.
pub async fn run(directory: &Path, node_name: &str, events: Sender, status: Arc<Status>) -> anyhow::Result<()> {
    let context = || format!("--manifests {}", directory.display());
    let (changed, mut changes) = mpsc::channel(1);
    let mut watcher = notify::recommended_watcher(move |event| {
        if is_change(&event) {
            // A change that finds another one waiting will be seen together with it.
            let _ = changed.try_send(());
        }
    })
    .with_context(context)?;
    watcher.watch(directory, RecursiveMode::NonRecursive).with_context(context)?;

    let mut folder = Folder::new(directory);
    folder.read().with_context(context)?;
    status.set_connected(true);
    let mut sent: Option<Objects> = None;
    loop {
        let mut objects = folder.objects();
        objects.nodes.retain(|node| *node.name == *node_name);
        if sent.as_ref() != Some(&objects) {
            info!(
                services = objects.services.len(),
                slices = objects.slices.len(),
                files = folder.files.len(),
                "manifests read"
            );
            for event in [
                Event::Slices(objects.slices.clone()),
                Event::Services(objects.services.clone()),
                Event::Node(objects.nodes.first().cloned()),
                Event::ServiceCidrs(objects.service_cidrs.clone()),
            ] {
                if send(&events, event).await.is_err() {
                    return Ok(());
                }
            }
            sent = Some(objects);
        }
        tokio::select! {
            () = events.closed() => return Ok(()),
            _ = timeout(REREAD, changes.recv()) => {}
        }
        while let Ok(Some(())) = timeout(QUIET, changes.recv()).await {}
        while let Err(error) = folder.read() {
            if status.connected() {
                warn!("{}: {error}; going on with what is known", context());
            }
            status.set_connected(false);
            sleep(Duration::from_secs(1)).await;
        }
        if !status.connected() {
            info!("{}: can be read again", context());
            status.set_connected(true);
            // A directory that was made anew is not the one that was watched.
            let _ = watcher.unwatch(directory);
            watcher.watch(directory, RecursiveMode::NonRecursive).with_context(context)?;
        }
    }
}

/// Whether the directory should be read again. That it was read, by the agent itself as well, is told too.
fn is_change(event: &notify::Result<notify::Event>) -> bool {
    !event.as_ref().is_ok_and(|event| {
        event.kind.is_access() && event.kind != EventKind::Access(AccessKind::Close(AccessMode::Write))
    })
}

/// The files of a directory, each with the last objects that could be read from it.
#[derive(Debug)]
pub struct Folder {
    directory: PathBuf,
    files: BTreeMap<PathBuf, File>,
    /// What was last said of objects that stand in two files.
    duplicates: Vec<String>,
}

#[derive(Debug, Default)]
struct File {
    /// Of the text that was last read, good or bad.
    hash: u64,
    objects: Objects,
}

impl Folder {
    pub fn new(directory: &Path) -> Self {
        Folder { directory: directory.to_owned(), files: BTreeMap::new(), duplicates: Vec::new() }
    }

    /// Reads what has changed. A file that is broken is reported and stays what it was.
    ///
    /// # Errors
    /// Where the directory itself cannot be read.
    pub fn read(&mut self) -> std::io::Result<()> {
        let mut found = BTreeMap::new();
        for entry in std::fs::read_dir(&self.directory)? {
            let path = entry?.path();
            if !is_manifest(&path) {
                continue;
            }
            let mut file = self.files.remove(&path).unwrap_or_default();
            match std::fs::read_to_string(&path) {
                Ok(text) => file.update(&path, &text),
                // Renamed or deleted since it was listed.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => warn!("{}: {error}; its last good state stays", path.display()),
            }
            found.insert(path, file);
        }
        self.files = found;
        self.report_duplicates();
        Ok(())
    }

    /// All files' objects; where two define the same one, the first by file name.
    pub fn objects(&self) -> Objects {
        let mut all = Objects::default();
        for file in self.files.values() {
            all.services.extend(file.objects.services.iter().cloned());
            all.slices.extend(file.objects.slices.iter().cloned());
            all.nodes.extend(file.objects.nodes.iter().cloned());
            all.service_cidrs.extend(file.objects.service_cidrs.iter().cloned());
        }
        all.services.sort_by(|one, other| one.name.cmp(&other.name));
        all.services.dedup_by(|other, first| other.name == first.name);
        all.slices.sort_by(|one, other| one.name.cmp(&other.name));
        all.slices.dedup_by(|other, first| other.name == first.name);
        all.nodes.sort_by(|one, other| one.name.cmp(&other.name));
        all.nodes.dedup_by(|other, first| other.name == first.name);
        all.service_cidrs.sort_by(|one, other| one.name.cmp(&other.name));
        all.service_cidrs.dedup_by(|other, first| other.name == first.name);
        all
    }

    fn report_duplicates(&mut self) {
        let mut first: BTreeMap<(&str, String), &Path> = BTreeMap::new();
        let mut duplicates = Vec::new();
        for (path, file) in &self.files {
            let services = file.objects.services.iter().map(|service| ("Service", service.name.to_string()));
            let slices = file.objects.slices.iter().map(|slice| ("EndpointSlice", slice.name.to_string()));
            let nodes = file.objects.nodes.iter().map(|node| ("Node", node.name.to_string()));
            let cidrs = file.objects.service_cidrs.iter().map(|cidr| ("ServiceCIDR", cidr.name.to_string()));
            for object in services.chain(slices).chain(nodes).chain(cidrs) {
                if let Some(first) = first.get(&object) {
                    let (kind, name) = object;
                    duplicates.push(format!(
                        "{}: {kind} {name} is already in {}: ignored",
                        path.display(),
                        first.display()
                    ));
                } else {
                    first.insert(object, path);
                }
            }
        }
        for duplicate in duplicates.iter().filter(|duplicate| !self.duplicates.contains(duplicate)) {
            warn!("{duplicate}");
        }
        self.duplicates = duplicates;
    }
}

impl File {
    fn update(&mut self, path: &Path, text: &str) {
        let mut hasher = DefaultHasher::new();
        text.hash(&mut hasher);
        let hash = hasher.finish();
        if self.hash == hash {
            return;
        }
        self.hash = hash;
        match parse(text) {
            Ok((objects, ignored)) => {
                self.objects = objects;
                for fault in ignored {
                    info!("{} {fault}", path.display());
                }
            }
            Err(fault) => warn!("{} {fault}; the file's last good state stays", path.display()),
        }
    }
}

/// Hidden files are editors' own.
fn is_manifest(path: &Path) -> bool {
    let hidden = path.file_name().and_then(|name| name.to_str()).is_none_or(|name| name.starts_with('.'));
    let yaml = path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
    yaml && !hidden && !path.is_dir()
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Header {
    api_version: Option<String>,
    kind: Option<String>,
    metadata: Metadata,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Metadata {
    name: Option<String>,
    namespace: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Items {
    items: Vec<Value>,
}

impl Header {
    fn describe(&self) -> Option<String> {
        let kind = self.kind.as_deref()?;
        let name = self.metadata.name.as_deref().unwrap_or("(no name)");
        Some(match self.metadata.namespace.as_deref() {
            Some(namespace) => format!("{kind} {namespace}/{name}"),
            None => format!("{kind} {name}"),
        })
    }

    /// `v1/Service`, as the API groups have it.
    fn kind(&self) -> String {
        format!(
            "{}/{}",
            self.api_version.as_deref().unwrap_or("(no apiVersion)"),
            self.kind.as_deref().unwrap_or("(no kind)")
        )
    }
}

/// A file's objects, and which of its documents are of no interest here.
///
/// # Errors
/// At the first document that cannot be understood: a file counts as a whole.
pub fn parse(text: &str) -> Result<(Objects, Vec<Fault>), Fault> {
    let mut objects = Objects::default();
    let mut ignored = Vec::new();
    for (first_line, document) in documents(text) {
        let header: Option<Header> = read(document, first_line).map_err(|fault| Fault { object: None, ..fault })?;
        let Some(header) = header else { continue };
        let named = |fault: Fault| Fault { object: header.describe(), ..fault };
        let fault = |problem: &str| Fault { line: first_line, object: header.describe(), problem: problem.to_owned() };
        if header.kind().ends_with("v1/List") {
            let list: Items = read(document, first_line).map_err(named)?.unwrap_or_default();
            for item in list.items {
                let header: Header = typed(item.clone()).map_err(|problem| fault(&problem))?;
                let outcome = add(&mut objects, &header, Source::Item(item));
                ignored.extend(at(outcome, &header, first_line)?);
            }
        } else {
            let outcome = add(&mut objects, &header, Source::Document(document, first_line));
            ignored.extend(at(outcome, &header, first_line)?);
        }
    }
    Ok((objects, ignored))
}

/// Gives an outcome its place in the file: whether the object was of no interest, or what is wrong with it.
fn at(outcome: Result<bool, Fault>, header: &Header, line: u64) -> Result<Option<Fault>, Fault> {
    match outcome {
        Ok(true) => Ok(None),
        Ok(false) => {
            let problem = format!("{} is not proxied: ignored", header.kind());
            Ok(Some(Fault { line, object: header.describe(), problem }))
        }
        Err(fault) => Err(Fault { line: fault.line.max(line), object: header.describe(), ..fault }),
    }
}

enum Source<'a> {
    Document(&'a str, u64),
    Item(Value),
}

impl Source<'_> {
    fn read<T: DeserializeOwned>(self) -> Result<T, Fault> {
        let fault = |problem: String| Fault { line: 0, object: None, problem };
        match self {
            Source::Document(text, first_line) => {
                read(text, first_line)?.ok_or_else(|| fault("the document is empty".to_owned()))
            }
            Source::Item(value) => typed(value).map_err(fault),
        }
    }
}

/// Whether it is an object that we know.
fn add(objects: &mut Objects, header: &Header, source: Source<'_>) -> Result<bool, Fault> {
    let fault = |problem: &str| Fault { line: 0, object: None, problem: problem.to_owned() };
    if header.metadata.name.as_deref().is_none_or(str::is_empty) && is_ours(header) {
        return Err(fault("it has no metadata.name"));
    }
    match header.kind().as_str() {
        "v1/Service" => {
            let object = source.read::<wire::Service>()?;
            if decode::has_label(object.metadata.as_ref(), decode::OTHER_PROXY_LABEL) {
                return Ok(true);
            }
            let service = decode::service(&object);
            known(objects.services.iter().map(|other| &other.name), &service.name)?;
            objects.services.push(service);
        }
        "discovery.k8s.io/v1/EndpointSlice" => {
            let object = source.read::<wire::EndpointSlice>()?;
            if decode::has_label(object.metadata.as_ref(), decode::HEADLESS_LABEL) {
                return Ok(true);
            }
            let slice = decode::slice(&object)
                .ok_or_else(|| fault(&format!("it has no {} among its metadata.labels", decode::SERVICE_NAME_LABEL)))?;
            known(objects.slices.iter().map(|other| &other.name), &slice.name)?;
            objects.slices.push(slice);
        }
        "v1/Endpoints" => objects.slices.extend(decode::endpoints(&source.read::<wire::Endpoints>()?)),
        "networking.k8s.io/v1/ServiceCIDR" => {
            objects.service_cidrs.push(decode::service_cidr(&source.read::<wire::ServiceCidr>()?));
        }
        "v1/Node" => objects.nodes.push(decode::node(&source.read::<wire::Node>()?)),
        _ => return Ok(false),
    }
    Ok(true)
}

fn is_ours(header: &Header) -> bool {
    matches!(
        header.kind().as_str(),
        "v1/Service"
            | "discovery.k8s.io/v1/EndpointSlice"
            | "v1/Endpoints"
            | "v1/Node"
            | "networking.k8s.io/v1/ServiceCIDR"
    )
}

fn known<'a>(mut names: impl Iterator<Item = &'a ObjectName>, name: &ObjectName) -> Result<(), Fault> {
    if names.any(|other| other == name) {
        return Err(Fault { line: 0, object: None, problem: "its metadata.name stands in this file twice".to_owned() });
    }
    Ok(())
}

/// None for a document with nothing in it.
fn read<T: DeserializeOwned>(document: &str, first_line: u64) -> Result<Option<T>, Fault> {
    let empty = document
        .lines()
        .map(|line| line.strip_prefix("---").unwrap_or(line).trim_start())
        .all(|line| line.is_empty() || line.starts_with('#'));
    if empty {
        return Ok(None);
    }
    let options = serde_saphyr::options! { with_snippet: false };
    let error = match serde_saphyr::from_str_with_options(document, options.clone()) {
        Ok(object) => return Ok(Some(object)),
        Err(error) => error,
    };
    let line = first_line + error.location().map_or(0, |location| location.line().saturating_sub(1));
    let fault = |problem: String| Fault { line, object: None, problem };
    // What is YAML, and yet not what it should be, is told as of an item of a List: with the field.
    match serde_saphyr::from_str_with_options::<Value>(document, options) {
        Ok(value) => typed(value).map(Some).map_err(fault),
        Err(_) => Err(fault(error.to_string())),
    }
}

/// The error names the field: `spec.ports[0].port: invalid type: ...`.
fn typed<T: DeserializeOwned>(value: Value) -> Result<T, String> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        if path == "." { error.into_inner().to_string() } else { error.to_string() }
    })
}

/// Each document with the number of its first line, from 1. A line that begins with `---` begins a document wherever it
/// stands: no scalar can hold one (YAML 1.2.2, 9.1.2).
fn documents(text: &str) -> Vec<(u64, &str)> {
    let mut documents = Vec::new();
    let (mut begin, mut begin_line) = (0, 1);
    let mut offset = 0;
    for (number, line) in (1..).zip(text.split_inclusive('\n')) {
        let is_marker =
            line.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace));
        if is_marker && offset > begin {
            documents.push((begin_line, &text[begin..offset]));
            (begin, begin_line) = (offset, number);
        }
        offset += line.len();
    }
    documents.push((begin_line, &text[begin..]));
    documents
}
