//! The conditions of a rule. Whatever AWS compares without regard to case is compared in lower
//! case, which a request's parts are brought into once.

use std::borrow::Cow;
use std::cell::OnceCell;

use hyper::header::HeaderName;
use ipnet::IpNet;
use regex::bytes::Regex;

use super::pattern::Wildcard;
use super::{CompileError, RequestView};
use crate::config::model::{self, Pattern};
use crate::regular_expression;

/// A compiled condition, see [`model::Condition`].
#[derive(Debug, Clone)]
pub(super) enum Condition {
    Method(Box<[Box<str>]>),
    SourceIp(Box<[IpNet]>),
    Path(Values),
    Host(Values),
    Query(Box<[Parameter]>),
    /// The field is an index of [`HeaderNames`].
    Header {
        field: usize,
        values: Values,
    },
}

/// Any of these.
#[derive(Debug, Clone, Default)]
pub(super) struct Values {
    pub(super) wildcards: Box<[Wildcard]>,
    pub(super) regexes: Box<[Regex]>,
}

/// A parameter of the query, in lower case.
#[derive(Debug, Clone)]
pub(super) struct Parameter {
    key: Option<Wildcard>,
    value: Wildcard,
}

/// The header fields that a listener's rules ask for, each once.
#[derive(Debug, Clone, Default)]
pub(super) struct HeaderNames(Vec<HeaderName>);

impl HeaderNames {
    fn index(&mut self, name: HeaderName) -> usize {
        self.0.iter().position(|known| *known == name).unwrap_or_else(|| {
            self.0.push(name);
            self.0.len() - 1
        })
    }
}

/// The lines of a field, in lower case.
type Lines<'a> = Vec<Cow<'a, [u8]>>;

/// A request with what has been found out about it.
pub(super) struct Evaluation<'a> {
    request: &'a RequestView<'a>,
    names: &'a HeaderNames,
    host: Cow<'a, [u8]>,
    query: OnceCell<Cow<'a, [u8]>>,
    /// The values of [`HeaderNames`].
    fields: Box<[OnceCell<Lines<'a>>]>,
}

impl<'a> Evaluation<'a> {
    pub(super) fn new(request: &'a RequestView<'a>, names: &'a HeaderNames) -> Self {
        Self {
            request,
            names,
            host: lower_case(request.host.without_root().as_bytes()),
            query: OnceCell::new(),
            fields: names.0.iter().map(|_| OnceCell::new()).collect(),
        }
    }

    /// In lower case, without port and root.
    pub(super) fn host(&self) -> &[u8] {
        &self.host
    }

    fn query(&self) -> &[u8] {
        self.query.get_or_init(|| lower_case(self.request.query.unwrap_or_default().as_bytes()))
    }

    fn field(&self, index: usize) -> &[Cow<'a, [u8]>] {
        self.fields[index].get_or_init(|| {
            let values = self.request.headers.get_all(&self.names.0[index]);
            values.iter().map(|value| lower_case(value.as_bytes())).collect()
        })
    }
}

fn lower_case(bytes: &[u8]) -> Cow<'_, [u8]> {
    if bytes.iter().any(u8::is_ascii_uppercase) {
        Cow::Owned(bytes.to_ascii_lowercase())
    } else {
        Cow::Borrowed(bytes)
    }
}

impl Condition {
    pub(super) fn compile(
        condition: &model::Condition,
        names: &mut HeaderNames,
    ) -> Result<Self, CompileError> {
        Ok(match condition {
            model::Condition::HttpRequestMethod(methods) => {
                Self::Method(methods.iter().map(|method| method.as_str().into()).collect())
            }
            model::Condition::SourceIp(networks) => Self::SourceIp(networks.clone().into()),
            model::Condition::PathPattern(values) => Self::Path(Values::compile(values, false)?),
            model::Condition::HostHeader(values) => Self::Host(Values::compile(values, true)?),
            model::Condition::QueryString(values) => {
                Self::Query(values.iter().map(Parameter::compile).collect())
            }
            model::Condition::HttpHeader { name, values } => {
                let field = HeaderName::try_from(name.as_str())
                    .map_err(|_| CompileError::HeaderName(name.clone()))?;
                Self::Header { field: names.index(field), values: Values::compile(values, true)? }
            }
        })
    }

    /// The cheap ones are asked first, regular expressions last.
    pub(super) fn cost(&self) -> u8 {
        let (kind, values) = match self {
            Self::Method(_) => (0, None),
            Self::SourceIp(_) => (1, None),
            Self::Path(values) => (2, Some(values)),
            Self::Host(values) => (3, Some(values)),
            Self::Query(_) => (4, None),
            Self::Header { values, .. } => (5, Some(values)),
        };
        match values {
            Some(values) if !values.regexes.is_empty() => kind + 10,
            _ => kind,
        }
    }

    pub(super) fn holds(&self, evaluation: &Evaluation<'_>) -> bool {
        let request = evaluation.request;
        match self {
            Self::Method(methods) => {
                methods.iter().any(|method| **method == *request.method.as_str())
            }
            Self::SourceIp(networks) => {
                let source = request.source.to_canonical();
                networks.iter().any(|network| network.contains(&source))
            }
            Self::Path(values) => values.match_any(request.path.as_bytes()),
            Self::Host(values) => values.match_any(evaluation.host()),
            Self::Query(parameters) => any_parameter(evaluation.query(), parameters),
            Self::Header { field, values } => {
                evaluation.field(*field).iter().any(|value| values.match_any(value))
            }
        }
    }
}

impl Values {
    fn compile(patterns: &[Pattern], lower_case: bool) -> Result<Self, CompileError> {
        let mut wildcards = Vec::new();
        let mut regexes = Vec::new();
        for pattern in patterns {
            match pattern {
                Pattern::Wildcard(pattern) => wildcards.push(Wildcard::new(pattern, lower_case)),
                Pattern::Regex(pattern) => regexes.push(
                    regular_expression::compile(pattern, lower_case)
                        .map_err(|error| CompileError::regex(pattern, &error))?,
                ),
            }
        }
        Ok(Self { wildcards: wildcards.into(), regexes: regexes.into() })
    }

    fn match_any(&self, value: &[u8]) -> bool {
        self.wildcards.iter().any(|wildcard| wildcard.matches(value))
            || self.regexes.iter().any(|regex| regex.is_match(value))
    }
}

impl Parameter {
    fn compile(pattern: &model::QueryPattern) -> Self {
        Self {
            key: pattern.key.as_deref().map(|key| Wildcard::new(key, true)),
            value: Wildcard::new(&pattern.value, true),
        }
    }

    fn matches(&self, key: &[u8], value: &[u8]) -> bool {
        self.value.matches(value) && self.key.as_ref().is_none_or(|wanted| wanted.matches(key))
    }
}

/// Parameters stand between `&`, a key before the first `=`; a parameter without one has an empty
/// value. Neither `+` nor `%` means anything.
fn any_parameter(query: &[u8], wanted: &[Parameter]) -> bool {
    query.split(|byte| *byte == b'&').filter(|parameter| !parameter.is_empty()).any(|parameter| {
        let (key, value) = match memchr::memchr(b'=', parameter) {
            Some(equals) => (&parameter[..equals], &parameter[equals + 1..]),
            None => (parameter, &[][..]),
        };
        wanted.iter().any(|wanted| wanted.matches(key, value))
    })
}
