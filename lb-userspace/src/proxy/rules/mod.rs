//! A listener's rules, and what they decide about a request.
//!
//! Source: "Condition types for listener rules" and "Listener rules" in AWS's guide to application
//! load balancers. A rule applies if all of its conditions hold, a condition holds if one of its
//! values matches; of the rules that apply the one with the lowest priority decides, and if there
//! is none, the default action.
//!
//! Everything is compared as it came: paths and queries stay percent-encoded, `/a/../b` is not
//! `/b`, and `//` is not `/`. A target that normalises must not rely on a path condition to keep
//! clients away from something.
//!
//! # Cost
//! Rules are found by host, domain (`*.example.com`) and first segment of the path (`/api/*`): a
//! decision among 100 such rules takes as long as one among 1, 0.1 to 0.2 us. Rules that have none of
//! these are tried one by one, on the busy machine that this was measured on 0.06 us each for
//! queries, 0.1 us for regular expressions and 0.2 us for `*word*` in paths and user agents. (Release
//! build; `cargo test --release -p lb-userspace -- --ignored --nocapture cost_of`.)
//!
//! Every worker should have a clone of its own: regular expressions keep scratch memory, over
//! which threads that share one would compete.

mod condition;
mod index;
pub mod pattern;

#[cfg(test)]
mod tests;

use std::fmt;
use std::net::IpAddr;

use hyper::{HeaderMap, Method};

use self::condition::{Condition, Evaluation, HeaderNames};
use self::index::Index;
use super::host::Host;
use super::redirect::{FixedResponse, Redirect};
use super::rewrite::Rewrite;
use crate::config::model::{self, Forward, ProxyListener};

/// What the rules look at.
#[derive(Debug, Clone, Copy)]
pub struct RequestView<'a> {
    /// The method.
    pub method: &'a Method,
    /// What `Host` or `:authority` names; of a request without one, `Host::parse("")`.
    pub host: Host<'a>,
    /// The path as it came, without the query.
    pub path: &'a str,
    /// What is behind the question mark, as it came.
    pub query: Option<&'a str>,
    /// All header fields, as they came.
    pub headers: &'a HeaderMap,
    /// The other end of the connection.
    pub source: IpAddr,
}

/// The compiled rules of a listener.
#[derive(Debug, Clone)]
pub struct Rules {
    rules: Vec<Rule>,
    default: Decision,
    names: HeaderNames,
    index: Index,
}

#[derive(Debug, Clone)]
struct Rule {
    conditions: Box<[Condition]>,
    decision: Decision,
}

/// What becomes of a request.
#[derive(Debug, Clone)]
pub struct Decision {
    /// Place in the order of rules, 0 for the default action, then 1 for the first rule: for
    /// tables that go with the rules.
    pub place: usize,
    /// The rule's priority, 1 to 50000; 0 for the default action, as in access logs.
    pub priority: u16,
    /// Changes path and query before the request is forwarded.
    pub url_rewrite: Option<Rewrite>,
    /// Changes the host before the request is forwarded.
    pub host_header_rewrite: Option<Rewrite>,
    /// What becomes of it.
    pub action: Action,
}

/// A compiled [`model::Action`].
#[derive(Debug, Clone)]
pub enum Action {
    /// To a target of one of these groups.
    Forward(Forward),
    /// The client is sent elsewhere.
    Redirect(Redirect),
    /// The answer is this.
    FixedResponse(FixedResponse),
}

/// Why rules do not compile. A checked configuration has none of these.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CompileError {
    /// The name of an `http_header` condition is none.
    HeaderName(String),
    /// A regular expression is none, or too big.
    Regex {
        /// The expression.
        pattern: String,
        /// What the compiler says.
        reason: String,
    },
    /// A redirect's or a fixed response's status, or the latter's content type.
    Response(String),
}

impl CompileError {
    pub(super) fn regex(pattern: &str, error: &regex::Error) -> Self {
        Self::Regex { pattern: pattern.to_owned(), reason: error.to_string() }
    }
}

impl fmt::Display for CompileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HeaderName(name) => write!(f, "\"{name}\" is no name of a header field"),
            Self::Regex { pattern, reason } => write!(f, "\"{pattern}\": {reason}"),
            Self::Response(value) => write!(f, "\"{value}\" cannot stand in a response"),
        }
    }
}

impl std::error::Error for CompileError {}

impl Rules {
    /// Compiles the rules of a listener.
    ///
    /// # Errors
    /// If the configuration was not checked: see [`CompileError`].
    pub fn compile(listener: &ProxyListener) -> Result<Self, CompileError> {
        let mut ordered: Vec<&model::Rule> = listener.rules.iter().collect();
        ordered.sort_by_key(|rule| rule.priority);

        let mut names = HeaderNames::default();
        let mut index = Index::default();
        let mut rules = Vec::with_capacity(ordered.len());
        for (place, rule) in (0..).zip(ordered) {
            let mut conditions = rule
                .conditions
                .iter()
                .map(|condition| Condition::compile(condition, &mut names))
                .collect::<Result<Box<[_]>, _>>()?;
            conditions.sort_by_key(Condition::cost);
            index.add(place, &conditions);
            let decision = Decision::compile(place as usize + 1, rule)?;
            rules.push(Rule { conditions, decision });
        }
        let default = Decision {
            place: 0,
            priority: 0,
            url_rewrite: None,
            host_header_rewrite: None,
            action: Action::compile(&listener.default_action)?,
        };
        Ok(Self { rules, default, names, index })
    }

    /// What becomes of a request.
    pub fn decide(&self, request: &RequestView<'_>) -> &Decision {
        if self.rules.is_empty() {
            return &self.default;
        }
        let evaluation = Evaluation::new(request, &self.names);
        let found = self.index.find(evaluation.host(), request.path.as_bytes(), |place| {
            self.rules[place as usize]
                .conditions
                .iter()
                .all(|condition| condition.holds(&evaluation))
        });
        found.map_or(&self.default, |place| &self.rules[place as usize].decision)
    }

    /// Every decision there can be, by [`Decision::place`].
    pub fn decisions(&self) -> impl Iterator<Item = &Decision> {
        std::iter::once(&self.default).chain(self.rules.iter().map(|rule| &rule.decision))
    }
}

impl Decision {
    fn compile(place: usize, rule: &model::Rule) -> Result<Self, CompileError> {
        let rewrite = |rewrite: &Option<model::Rewrite>, ignore_case| {
            rewrite.as_ref().map(|rewrite| Rewrite::compile(rewrite, ignore_case)).transpose()
        };
        Ok(Self {
            place,
            priority: rule.priority,
            url_rewrite: rewrite(&rule.transforms.url_rewrite, false)?,
            host_header_rewrite: rewrite(&rule.transforms.host_header_rewrite, true)?,
            action: Action::compile(&rule.action)?,
        })
    }
}

impl Action {
    fn compile(action: &model::Action) -> Result<Self, CompileError> {
        Ok(match action {
            model::Action::Forward(forward) => Self::Forward(forward.clone()),
            model::Action::Redirect(redirect) => Self::Redirect(Redirect::compile(redirect)?),
            model::Action::FixedResponse(response) => {
                Self::FixedResponse(FixedResponse::compile(response)?)
            }
        })
    }
}
