//! Changes to a document, each at one place that is chosen at random.
use proptest::prelude::*;
use proptest::sample::{Index, select};
use serde_json::{Value, json};

/// What is done at a place of a document.
#[derive(Clone, Debug)]
enum Change {
    Delete,
    Replace(Value),
    /// A field gets another name; where the place is in a list, nothing happens.
    Rename(String),
    /// A field beside it, or one more of the list.
    Insert(String, Value),
    /// In a list as often again.
    Repeat(usize),
    /// One character of a text becomes this.
    Character(Index, String),
    /// What stands at another place of the document.
    Copy(Index),
}

#[derive(Clone, Debug)]
pub(super) struct Mutation {
    at: Index,
    change: Change,
}

/// The way to a place: names of fields, and numbers in lists.
pub(super) type Path = Vec<String>;

fn nested(depth: usize) -> Value {
    (0..depth).fold(Value::Null, |inner, _| json!([inner]))
}

fn values() -> impl Strategy<Value = Value> {
    let texts = [
        "",
        " ",
        "0",
        "-1",
        "-5s",
        "5s-3s",
        "1h",
        "99999999999999999999h",
        "None",
        "true",
        "127.0.0.1",
        "169.254.169.254",
        "0.0.0.0",
        "::",
        "::1",
        "::ffff:10.0.0.1",
        "fe80::1%eth0",
        "999.1.1.1",
        "010.1.1.1",
        "0.0.0.0/0",
        "::/0",
        "10.0.0.0/33",
        "IPv4",
        "IPv6",
        "FQDN",
        "TCP",
        "SCTP",
        "Local",
        "ClientIP",
        "ExternalName",
        "NodeCIDR",
        "BridgeInterface",
        "primary",
        ":10256",
        "[::]:0",
        "1.2.3.4:99999",
        "\u{1b}[2J\u{202e}\0\n",
        "網ä",
        "---",
        "&a *a",
        "2024-13-99T99:99:99Z",
    ];
    let mut all: Vec<Value> = texts.iter().map(|text| json!(text)).collect();
    all.push("x".repeat(300).into());
    all.extend([json!(null), json!(true), json!(false), json!([]), json!({}), json!([null]), json!({ "": {} })]);
    all.extend([json!(0), json!(1), json!(-1), json!(65_535), json!(65_536), json!(u32::MAX), json!(i64::MIN)]);
    all.extend([json!(u64::MAX), json!(1.5), json!(1e300), nested(40)]);
    select(all)
}

pub(super) fn mutations() -> impl Strategy<Value = Mutation> {
    let names = select(&["", "x", "spec", "ports", "Kind", "\u{1b}", "items", "mode"][..]).prop_map(str::to_owned);
    let character =
        select(&["", "0", "9", ".", ":", "/", "-", "\0", "ä", "\u{202e}", "aa"][..]).prop_map(str::to_owned);
    let change = prop_oneof![
        2 => Just(Change::Delete),
        6 => values().prop_map(Change::Replace),
        1 => names.clone().prop_map(Change::Rename),
        2 => (names, values()).prop_map(|(name, value)| Change::Insert(name, value)),
        1 => (1..40usize).prop_map(Change::Repeat),
        4 => (any::<Index>(), character).prop_map(|(at, text)| Change::Character(at, text)),
        2 => any::<Index>().prop_map(Change::Copy),
    ];
    (any::<Index>(), change).prop_map(|(at, change)| Mutation { at, change })
}

/// All places but the root.
fn paths(value: &Value, prefix: &Path, found: &mut Vec<Path>) {
    let mut visit = |name: String, value: &Value| {
        let path = [prefix.as_slice(), &[name]].concat();
        found.push(path.clone());
        paths(value, &path, found);
    };
    match value {
        Value::Object(fields) => fields.iter().for_each(|(name, value)| visit(name.clone(), value)),
        Value::Array(list) => list.iter().enumerate().for_each(|(index, value)| visit(index.to_string(), value)),
        _ => {}
    }
}

fn child<'a>(value: &'a mut Value, name: &str) -> Option<&'a mut Value> {
    match value {
        Value::Object(fields) => fields.get_mut(name),
        Value::Array(list) => list.get_mut(name.parse::<usize>().ok()?),
        _ => None,
    }
}

impl Mutation {
    /// Returns the way to what has changed: to the new field, where one was added, and to both where one was renamed. Empty
    /// where nothing has.
    pub(super) fn apply(&self, document: &mut Value) -> Vec<Path> {
        self.change(document).unwrap_or_default()
    }

    fn change(&self, document: &mut Value) -> Option<Vec<Path>> {
        let mut all = Vec::new();
        paths(document, &Path::new(), &mut all);
        if all.is_empty() {
            return None;
        }
        let mut path = self.at.get(&all).clone();
        let (name, parents) = path.split_last()?;
        let name = name.clone();
        let copied = match &self.change {
            Change::Copy(from) => {
                from.get(&all).iter().try_fold(&mut document.clone(), |value, name| child(value, name))?.clone()
            }
            _ => Value::Null,
        };
        let parent = parents.iter().try_fold(document, |value, name| child(value, name))?;
        match &self.change {
            Change::Delete => match parent {
                Value::Object(fields) => drop(fields.remove(&name)),
                Value::Array(list) => drop(list.remove(name.parse().ok()?)),
                _ => return None,
            },
            Change::Replace(value) => *child(parent, &name)? = value.clone(),
            Change::Copy(_) => *child(parent, &name)? = copied,
            Change::Rename(new) => {
                let fields = parent.as_object_mut()?;
                let value = fields.remove(&name)?;
                fields.insert(new.clone(), value);
                let old = path.clone();
                *path.last_mut()? = new.clone();
                return Some(vec![old, path]);
            }
            Change::Insert(new, value) => match parent {
                Value::Object(fields) => {
                    fields.insert(new.clone(), value.clone());
                    *path.last_mut()? = new.clone();
                }
                Value::Array(list) => list.push(value.clone()),
                _ => return None,
            },
            Change::Repeat(times) => {
                let list = parent.as_array_mut()?;
                let value = list.get(name.parse::<usize>().ok()?)?.clone();
                list.extend(std::iter::repeat_n(value, *times));
            }
            Change::Character(at, new) => {
                let Value::String(text) = child(parent, &name)? else { return None };
                let places: Vec<(usize, char)> = text.char_indices().collect();
                let (start, old) = if places.is_empty() { return None } else { *at.get(&places) };
                text.replace_range(start..start + old.len_utf8(), new);
            }
        }
        Some(vec![path])
    }
}

/// A text with some bytes deleted, changed or doubled.
pub(super) fn texts(base: String) -> impl Strategy<Value = String> {
    let change = (any::<Index>(), 0..5u8, any::<u8>(), 1..200usize);
    prop::collection::vec(change, 1..12).prop_map(move |changes| {
        let mut bytes = base.clone().into_bytes();
        for (at, kind, byte, length) in changes {
            if bytes.is_empty() {
                break;
            }
            let at = at.index(bytes.len());
            let end = (at + length).min(bytes.len());
            match kind {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                2 => drop(bytes.drain(at..end)),
                3 => bytes.truncate(at),
                _ => {
                    let piece = bytes[at..end].to_vec();
                    bytes.splice(at..at, piece);
                }
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Whether an error names it, as it is or escaped.
pub(super) fn names(error: &str, name: &str) -> bool {
    error.contains(name) || error.contains(&name.escape_debug().to_string())
}
