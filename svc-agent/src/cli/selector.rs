//! A Service as a user names it.
use std::str::FromStr;

/// `NAME` in any namespace, or `NAMESPACE/NAME`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Selector {
    namespace: Option<String>,
    name: String,
}

impl Selector {
    pub fn matches(&self, namespace: &str, name: &str) -> bool {
        self.name == name && self.namespace.as_ref().is_none_or(|wanted| wanted == namespace)
    }
}

impl FromStr for Selector {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (namespace, name) = match text.split_once('/') {
            Some((namespace, name)) => (Some(namespace), name),
            None => (None, text),
        };
        if name.is_empty() || name.contains('/') || namespace == Some("") {
            return Err("a Service is named NAME or NAMESPACE/NAME".to_owned());
        }
        Ok(Selector { namespace: namespace.map(str::to_owned), name: name.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::Selector;
    use rstest::rstest;

    #[rstest]
    #[case("web", true)]
    #[case("default/web", true)]
    #[case("other/web", false)]
    #[case("default/api", false)]
    fn a_namespace_is_looked_at_where_it_is_given(#[case] text: &str, #[case] matches: bool) {
        assert_eq!(text.parse::<Selector>().unwrap().matches("default", "web"), matches);
    }

    #[rstest]
    #[case("")]
    #[case("/web")]
    #[case("default/")]
    #[case("a/b/c")]
    fn what_names_no_service_is_refused(#[case] text: &str) {
        assert!(text.parse::<Selector>().is_err());
    }
}
