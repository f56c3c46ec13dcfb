//! What README.md and docs/ say that can be tried: commands, flags, names. What a section is about has its tests elsewhere
//! (procedures of operations.md in `deploy`, what listens in `security`, reasons in svc-common).
use std::collections::BTreeSet;
use std::fmt::Write as _;

use clap::{Arg, CommandFactory as _, Parser as _};
use serde_json::Value;
use svc_agent::cli::Cli;
use svc_agent::notes::Reason;
use svc_lab::agent::ask;
use svc_lab::topology::NODES;
use svc_tests::cluster::{Cluster, http_get_path, service};
use svc_tests::operations::{OPERATIONS, table};

const FLAGS: &str = include_str!("../docs/flags.md");
const DOCUMENTS: [(&str, &str); 9] = [
    ("README.md", include_str!("../README.md")),
    ("CONTRIBUTING.md", include_str!("../CONTRIBUTING.md")),
    ("docs/architecture.md", include_str!("../docs/architecture.md")),
    ("docs/benchmarks.md", include_str!("../docs/benchmarks.md")),
    ("docs/dataplane.md", include_str!("../docs/dataplane.md")),
    ("docs/flags.md", FLAGS),
    ("docs/operations.md", OPERATIONS),
    ("docs/parity.md", include_str!("../docs/parity.md")),
    ("deploy/kind/README.md", include_str!("../deploy/kind/README.md")),
];

/// Indented blocks' lines, and what stands between backticks, without line breaks.
fn code(document: &str) -> Vec<String> {
    let is_code = |line: &&str| line.starts_with("    ");
    let mut found: Vec<String> = document.lines().filter(is_code).map(|line| line.trim().to_owned()).collect();
    let prose: Vec<&str> = document.lines().filter(|line| !is_code(line)).collect();
    found.extend(prose.join(" ").split('`').skip(1).step_by(2).map(str::to_owned));
    found
}

/// Every `svc-agent SUBCOMMAND ...` that the documents have, in words: alternatives apart, what may be left out there and
/// not there, placeholders with a value.
fn commands() -> Vec<(&'static str, Vec<String>)> {
    let mut commands = Vec::new();
    for (document, text) in DOCUMENTS {
        for line in code(text) {
            let line = line.split(" #").next().unwrap_or_default();
            let Some(rest) = line.strip_prefix("svc-agent ").or(line.strip_prefix("kubectl svc ")) else { continue };
            for alternative in rest.split(" | ") {
                let with = alternative.replace(['[', ']'], "");
                let without: String =
                    alternative.split('[').map(|part| part.rsplit(']').next().unwrap_or("")).collect();
                for command in BTreeSet::from([with, without]) {
                    // Those of `kubectl svc` itself, and what is for the reader only.
                    let own = |word: &&str| !["--all-nodes", "--node", "NODE", "->", "..."].contains(word);
                    let words = command.split_whitespace().map(|word| word.trim_matches('\'')).filter(own);
                    let value = |word: &str| match word {
                        "SHELL" => "bash".to_owned(),
                        "SERVICE" => "default/hostnames".to_owned(),
                        other => other.to_owned(),
                    };
                    let words: Vec<String> = words.map(value).collect();
                    if !words.is_empty() {
                        commands.push((document, words));
                    }
                }
            }
        }
    }
    commands
}

#[test]
fn every_command_of_the_documents_is_one() {
    let commands = commands();
    assert!(commands.len() > 30, "{commands:?}");
    for (document, words) in commands {
        // `--node-name NODE` has lost its value above.
        let words = words.iter().flat_map(|word| match word.as_str() {
            "--node-name" => vec!["--node-name", "a"],
            word => vec![word],
        });
        let result = Cli::try_parse_from(["svc-agent"].into_iter().chain(words.clone()));
        let help = |error: &clap::Error| error.kind() == clap::error::ErrorKind::DisplayHelp;
        let error = result.err().filter(|error| !help(error));
        assert!(error.is_none(), "{document}: svc-agent {}: {}", words.collect::<Vec<_>>().join(" "), error.unwrap());
    }
}

#[test]
fn what_looks_at_a_node_does_so_as_the_documents_have_it() {
    const LOOKING: [&str; 7] = ["services", "backends", "flows", "affinity", "maps", "status", "trace"];
    let mut cluster = Cluster::with_manifests();
    let [mut dns, slice] = service("dns", "10.96.0.10", &["a1"]);
    dns["spec"]["ports"][0]["port"] = 53.into();
    cluster.change(|manifests| [dns, slice].into_iter().for_each(|object| manifests.put(object)));
    cluster.expect_soon("client", "http://10.96.0.10:53/", &["a1"]);
    let mut tried = BTreeSet::new();
    for (document, words) in commands().into_iter().filter(|(_, words)| LOOKING.contains(&words[0].as_str())) {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let output = ask(&cluster.lab, &NODES[0], &words).unwrap();
        let told = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
        assert!(output.status.success(), "{document}: svc-agent {}: {told:?}", words.join(" "));
        tried.insert(words[0].to_owned());
    }
    assert_eq!(tried, LOOKING.map(str::to_owned).into());
}

/// A row of docs/flags.md.
fn flag_row(arg: &Arg) -> String {
    let mut name = arg.get_long().map_or_else(|| arg.get_id().as_str().to_uppercase(), |long| format!("--{long}"));
    if let Some(short) = arg.get_short() {
        name = format!("-{short}, {name}");
    }
    if arg.get_long().is_some() && arg.get_action().takes_values() {
        let values = arg.get_value_names().unwrap_or_default();
        write!(name, " {}", values.iter().map(|value| value.as_str()).collect::<Vec<_>>().join(" ")).unwrap();
    }
    let mut help = arg.get_help().map(ToString::to_string).unwrap_or_default().replace('|', "\\|");
    let takes_values = arg.get_action().takes_values();
    let possible: Vec<_> = arg.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect();
    if takes_values && !possible.is_empty() {
        help = format!("{}. One of {}.", help.trim_end_matches('.'), possible.join(", "));
    }
    let defaults: Vec<_> = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
    if takes_values && !defaults.is_empty() {
        write!(help, " [default: {}]", defaults.join(" ")).unwrap();
    }
    format!("| `{name}` | {help} |\n")
}

/// docs/flags.md, as the program has it.
fn flags() -> String {
    let command = Cli::command();
    let own = |arg: &&Arg| !["help", "version"].contains(&arg.get_id().as_str());
    let run: BTreeSet<&str> =
        command.find_subcommand("run").unwrap().get_arguments().filter_map(Arg::get_long).collect();
    let mut text = "# Flags\n`svc-agent --help`, `svc-agent run --help` and so on say the same in more words. \
                    [operations.md](operations.md) says what most\nof them are for. A test compares this with the program.\n\n\
                    Of every subcommand:\n\n| flag | meaning |\n|---|---|\n"
        .to_owned();
    command.get_arguments().filter(own).for_each(|arg| text.push_str(&flag_row(arg)));
    for subcommand in command.get_subcommands() {
        let shares =
            subcommand.get_name() != "run" && subcommand.get_arguments().any(|arg| arg.get_long() == Some("config"));
        let is_shared = |arg: &Arg| shares && arg.get_long().is_some_and(|long| run.contains(long));
        let about = subcommand.get_about().map(ToString::to_string).unwrap_or_default();
        let about = about.strip_suffix('.').unwrap_or(&about);
        write!(
            text,
            "\n## {}\n{about}.{}\n",
            subcommand.get_name(),
            if shares { " It takes the flags of `run` as well." } else { "" }
        )
        .unwrap();
        let rows: String = subcommand.get_arguments().filter(own).filter(|arg| !is_shared(arg)).map(flag_row).collect();
        if !rows.is_empty() {
            write!(text, "\n| flag | meaning |\n|---|---|\n{rows}").unwrap();
        }
    }
    text
}

#[test]
fn every_flag_is_in_the_document_of_flags_and_no_other() {
    let flags = flags();
    assert_eq!(FLAGS, flags, "docs/flags.md is to be\n{flags}");
}

#[test]
fn every_flag_that_the_documents_name_is_one() {
    let command = Cli::command();
    let all = command.get_subcommands().flat_map(clap::Command::get_arguments).chain(command.get_arguments());
    let known: BTreeSet<String> = all.filter_map(Arg::get_long).map(|long| format!("--{long}")).collect();
    // kubectl svc's, kubectl's, kube-proxy's, kube-apiserver's, xtask's.
    let others = [
        "--help",
        "--all-nodes",
        "--cleanup",
        "--enable-admission-plugins",
        "--kernel",
        "--config",
        "--objects",
        "--name",
        "--only",
        "--take-overs",
    ];
    let mut seen = 0;
    for (document, text) in DOCUMENTS {
        let is_flag =
            |span: &&String| span.strip_prefix("--").is_some_and(|name| name.starts_with(|c: char| c.is_alphabetic()));
        for span in code(text).iter().filter(is_flag) {
            let flag = span.split([' ', '=']).next().unwrap();
            assert!(known.contains(flag) || others.contains(&flag), "{document}: {span}");
            seen += 1;
        }
    }
    assert!(seen > 50, "{seen}");
}

fn difference(documented: &BTreeSet<String>, told: &BTreeSet<String>) -> [Vec<String>; 2] {
    [documented.difference(told).cloned().collect(), told.difference(documented).cloned().collect()]
}

/// The names in a cell: `a_total{label}, _pending` are a_total and a_pending.
fn metric_names(cell: &str) -> Vec<String> {
    let without_labels: String = cell
        .split('{')
        .enumerate()
        .map(|(at, part)| if at == 0 { part } else { part.split_once('}').unwrap().1 })
        .collect();
    let mut names: Vec<String> = Vec::new();
    for name in without_labels.split(", ") {
        match (name.strip_prefix('_'), names.last()) {
            (Some(suffix), Some(last)) => {
                let (stem, _) = last.rsplit_once('_').unwrap();
                names.push(format!("{stem}_{suffix}"));
            }
            _ => names.push(name.to_owned()),
        }
    }
    names
}

#[test]
fn every_metric_is_documented_and_every_documented_one_is_told() {
    let cluster = Cluster::with_arguments(&["--count-bytes"]);
    let page = http_get_path(&cluster.lab, NODES[0].name, "127.0.0.1:10249", "/metrics").unwrap();
    let told: BTreeSet<String> =
        page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).map(str::to_owned).collect();
    let (ours, rest) = OPERATIONS.split_once("\n## Metrics\n").unwrap().1.split_once("\nsvc's own:\n").unwrap();
    let own = rest.split_once("\n## ").unwrap().0;
    let rows = ours.lines().chain(own.lines()).filter(|line| line.starts_with("| ") && !line.starts_with("| metric"));
    let documented: BTreeSet<String> =
        rows.flat_map(|row| metric_names(row.trim_matches('|').split('|').next().unwrap().trim())).collect();
    assert_eq!(difference(&documented, &told), [vec![""; 0], vec![]], "documented only, told only");
}

#[test]
fn every_check_is_documented_and_every_documented_one_is_made() {
    let cluster = Cluster::with_manifests();
    let manifests = cluster.lab.directory().join("manifests");
    let arguments = ["check", "--uplink", "eth0", "--manifests", manifests.to_str().unwrap(), "-o", "json"];
    let output = ask(&cluster.lab, &NODES[0], &arguments).unwrap();
    let lines: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let told = lines.iter().map(|line| line["check"].as_str().unwrap().to_owned()).collect();
    let rows = table("## Is this machine fit");
    let names = rows.iter().flat_map(|row| row[0].split(", "));
    let documented = names.map(|name| name.trim_matches('`').to_owned()).collect();
    assert_eq!(difference(&documented, &told), [vec![""; 0], vec![]], "documented only, made only");
}

#[test]
fn every_path_of_the_document_is_answered() {
    let cluster = Cluster::with_manifests();
    let mut address = "";
    let mut paths = 0;
    for row in table("## Status") {
        address = match row[0] {
            "`--healthz-bind-address`" => "127.0.0.1:10256",
            "`--metrics-bind-address`" => "127.0.0.1:10249",
            "" => address,
            other => panic!("{other}"),
        };
        let answer = http_get_path(&cluster.lab, NODES[0].name, address, row[1]).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 "), "{address} {}: {answer}", row[1]);
        paths += 1;
    }
    assert_eq!(paths, 6);
}

#[test]
fn every_events_reason_is_documented_and_no_other() {
    let documented = table("## Events").iter().map(|row| row[0].trim_matches('`').to_owned()).collect();
    let told = Reason::ALL.iter().map(|reason| reason.label().to_owned()).collect();
    assert_eq!(difference(&documented, &told), [vec![""; 0], vec![]], "documented only, told only");
}
