//! A folder of manifests, as people and tools edit it.
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecursiveMode, Watcher as _};
use svc_agent::source::Event;
use svc_agent::source::manifests::{self, Folder, parse};
use svc_agent::status::Status;
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::time::timeout;

fn service(name: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\nspec:\n  clusterIP: 10.96.0.1\n  ports:\n  - port: 80\n"
    )
}

fn names(folder: &Folder) -> Vec<String> {
    folder.objects().services.iter().map(|service| service.name.to_string()).collect()
}

#[test]
fn a_fault_names_its_line_and_object() {
    let text = format!("# first\n{}---\n{}", service("good"), service("bad").replace("port: 80", "port: eighty"));
    let fault = parse(&text).unwrap_err();
    assert_eq!((fault.line, fault.object.as_deref()), (18, Some("Service bad")), "{fault}");
}

#[test]
fn broken_yaml_names_its_line() {
    let text = format!("{}---\nkind: [oops\nmetadata: {{\n", service("good"));
    let fault = parse(&text).unwrap_err();
    assert!((10..=13).contains(&fault.line), "{fault}");
}

#[test]
fn an_item_of_a_list_is_named() {
    let text = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Service\n  metadata: {name: odd}\n  spec: {ports: 7}\n";
    let fault = parse(text).unwrap_err();
    assert_eq!(fault.object.as_deref(), Some("Service odd"), "{fault}");
}

#[test]
fn comments_empty_documents_and_other_kinds_are_no_faults() {
    let text =
        format!("---\n# nothing\n---\n\n--- # a comment\n{}---\napiVersion: apps/v1\nkind: Deployment\n", service("a"));
    let (objects, ignored) = parse(&text).unwrap();
    assert_eq!(objects.services.len(), 1);
    assert_eq!(ignored.len(), 1);
}

#[test]
fn a_broken_file_keeps_its_last_good_state_and_costs_others_nothing() {
    let directory = TempDir::new().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("a.yaml"), service("a")).unwrap();
    fs::write(path("b.yml"), service("b")).unwrap();
    let mut folder = Folder::new(directory.path());
    folder.read().unwrap();
    assert_eq!(names(&folder), ["default/a", "default/b"]);

    fs::write(path("a.yaml"), "kind: [").unwrap();
    fs::write(path("b.yml"), service("b2")).unwrap();
    folder.read().unwrap();
    assert_eq!(names(&folder), ["default/a", "default/b2"]);

    fs::remove_file(path("a.yaml")).unwrap();
    folder.read().unwrap();
    assert_eq!(names(&folder), ["default/b2"]);
}

#[test]
fn an_object_in_two_files_is_the_first_ones() {
    let directory = TempDir::new().unwrap();
    fs::write(directory.path().join("1.yaml"), service("a")).unwrap();
    fs::write(directory.path().join("2.yaml"), service("a").replace("10.96.0.1", "10.96.0.2")).unwrap();
    let mut folder = Folder::new(directory.path());
    folder.read().unwrap();
    let objects = folder.objects();
    assert_eq!(objects.services.len(), 1);
    assert_eq!(objects.services[0].cluster_ips[0].to_string(), "10.96.0.1");
}

#[test]
fn hidden_files_and_other_extensions_are_not_read() {
    let directory = TempDir::new().unwrap();
    for name in [".a.yaml.swp", ".b.yaml", "c.yaml~", "d.txt"] {
        fs::write(directory.path().join(name), service("a")).unwrap();
    }
    let mut folder = Folder::new(directory.path());
    folder.read().unwrap();
    assert_eq!(names(&folder), Vec::<String>::new());
}

async fn next_services(events: &mut mpsc::Receiver<Event>) -> Vec<String> {
    loop {
        let event = timeout(Duration::from_secs(5), events.recv()).await.expect("no event came").unwrap();
        if let Event::Services(services) = event {
            return services.iter().map(|service| service.name.name.to_string()).collect();
        }
    }
}

fn watched(directory: &Path) -> mpsc::Receiver<Event> {
    let (sender, events) = mpsc::channel(16);
    let directory = directory.to_owned();
    tokio::spawn(async move { manifests::run(&directory, "node-a", sender, Arc::new(Status::default())).await });
    events
}

#[tokio::test]
async fn an_editors_rename_over_a_file_is_seen() {
    let directory = TempDir::new().unwrap();
    fs::write(directory.path().join("a.yaml"), service("a")).unwrap();
    let mut events = watched(directory.path());
    assert_eq!(next_services(&mut events).await, ["a"]);
    fs::write(directory.path().join(".a.tmp"), service("b")).unwrap();
    fs::rename(directory.path().join(".a.tmp"), directory.path().join("a.yaml")).unwrap();
    assert_eq!(next_services(&mut events).await, ["b"]);
}

#[tokio::test]
async fn a_burst_of_changes_is_one_change() {
    let directory = TempDir::new().unwrap();
    let mut events = watched(directory.path());
    assert_eq!(next_services(&mut events).await, Vec::<String>::new());
    for index in 0..20 {
        fs::write(directory.path().join(format!("{index:02}.yaml")), service(&format!("s{index:02}"))).unwrap();
    }
    assert_eq!(next_services(&mut events).await.len(), 20);
}

#[tokio::test]
async fn a_directory_that_nobody_changes_is_not_read_again_and_again() {
    let directory = TempDir::new().unwrap();
    fs::write(directory.path().join("a.yaml"), service("a")).unwrap();
    let mut events = watched(directory.path());
    next_services(&mut events).await;
    let (sender, opened) = std::sync::mpsc::channel();
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        if event.is_ok_and(|event| event.kind == EventKind::Access(AccessKind::Open(AccessMode::Any))) {
            sender.send(()).unwrap();
        }
    })
    .unwrap();
    watcher.watch(directory.path(), RecursiveMode::NonRecursive).unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let count = opened.try_iter().count();
    assert!(count < 5, "read {count} times");
}
