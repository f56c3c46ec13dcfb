//! Which namespaces' Services are shown.

/// A cluster's namespaces, by the conventions of kubectl; but there is no current one, so that all are shown where none is
/// named.
#[derive(clap::Args, Clone, PartialEq, Eq, Debug, Default)]
pub struct Namespaces {
    /// Of this namespace only.
    #[arg(short, long, value_name = "NAME", conflicts_with = "all_namespaces")]
    namespace: Option<String>,

    /// Of all namespaces, which is the default: there is no current one.
    #[arg(short = 'A', long)]
    all_namespaces: bool,
}

impl Namespaces {
    pub fn has(&self, namespace: &str) -> bool {
        self.namespace.as_ref().is_none_or(|wanted| wanted == namespace)
    }

    /// `name`: NAMESPACE/NAME, or none where the Service is not known.
    pub fn has_service(&self, name: Option<&str>) -> bool {
        match name.and_then(|name| name.split_once('/')) {
            Some((namespace, _)) => self.has(namespace),
            None => self.namespace.is_none(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_of_no_known_service_is_shown_where_no_namespace_is_named() {
        let one = Namespaces { namespace: Some("default".to_owned()), ..Namespaces::default() };
        let all = Namespaces::default();
        for (name, in_one) in [(Some("default/web"), true), (Some("other/web"), false), (None, false)] {
            assert_eq!((one.has_service(name), all.has_service(name)), (in_one, true), "{name:?}");
        }
    }
}
