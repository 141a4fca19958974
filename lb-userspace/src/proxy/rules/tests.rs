use std::hint::black_box;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use hyper::Method;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use proptest::prelude::*;

use super::{Action, CompileError, RequestView, Rules};
use crate::config::model::{
    self, Condition, FixedResponse, Pattern, ProxyListener, ProxyProtocol, QueryPattern, Transforms,
};
use crate::proxy::host::Host;

fn answer(body: &str) -> model::Action {
    model::Action::FixedResponse(FixedResponse {
        status: 200,
        content_type: String::new(),
        body: body.to_owned(),
    })
}

fn rule(priority: u16, conditions: Vec<Condition>) -> model::Rule {
    model::Rule {
        priority,
        conditions,
        transforms: Transforms::default(),
        action: answer(&priority.to_string()),
    }
}

fn listener(rules: Vec<model::Rule>) -> ProxyListener {
    ProxyListener {
        protocol: ProxyProtocol::Http,
        port: 80,
        tls: None,
        default_action: answer("default"),
        rules,
    }
}

fn compile(rules: Vec<model::Rule>) -> Rules {
    Rules::compile(&listener(rules)).unwrap()
}

fn wildcards(values: &[&str]) -> Vec<Pattern> {
    values.iter().map(|value| Pattern::Wildcard((*value).to_owned())).collect()
}

fn regexes(values: &[&str]) -> Vec<Pattern> {
    values.iter().map(|value| Pattern::Regex((*value).to_owned())).collect()
}

fn path(values: &[&str]) -> Condition {
    Condition::PathPattern(wildcards(values))
}

fn host(values: &[&str]) -> Condition {
    Condition::HostHeader(wildcards(values))
}

/// `GET http://host/path?query` from 192.0.2.1.
struct Request {
    method: Method,
    host: &'static str,
    path: String,
    query: Option<String>,
    headers: HeaderMap,
    source: IpAddr,
}

fn get(host: &'static str, url: &str) -> Request {
    let (path, query) = match url.split_once('?') {
        Some((path, query)) => (path, Some(query.to_owned())),
        None => (url, None),
    };
    Request {
        method: Method::GET,
        host,
        path: path.to_owned(),
        query,
        headers: HeaderMap::new(),
        source: IpAddr::from([192, 0, 2, 1]),
    }
}

impl Request {
    fn with(mut self, name: &'static str, value: &[u8]) -> Self {
        self.headers.append(HeaderName::from_static(name), HeaderValue::from_bytes(value).unwrap());
        self
    }

    fn view(&self) -> RequestView<'_> {
        RequestView {
            method: &self.method,
            host: Host::parse(self.host).unwrap(),
            path: &self.path,
            query: self.query.as_deref(),
            headers: &self.headers,
            source: self.source,
        }
    }

    /// The priority of the rule that decides, 0 for the default action.
    fn decided(&self, rules: &Rules) -> u16 {
        rules.decide(&self.view()).priority
    }
}

#[test]
fn the_lowest_priority_that_applies_decides() {
    let rules = compile(vec![
        rule(30, vec![path(&["/*"])]),
        rule(20, vec![path(&["/a/*"])]),
        rule(10, vec![path(&["/a/b/*"]), host(&["example.com"])]),
    ]);
    assert_eq!(get("example.com", "/a/b/c").decided(&rules), 10);
    assert_eq!(get("example.org", "/a/b/c").decided(&rules), 20);
    assert_eq!(get("example.org", "/a").decided(&rules), 30);
    let rules = compile(vec![rule(1, vec![path(&["/x"])])]);
    let request = get("a", "/y");
    let decision = rules.decide(&request.view());
    assert_eq!((decision.priority, decision.place), (0, 0));
    assert!(matches!(&decision.action, Action::FixedResponse(answer) if answer.body == "default"));
}

#[test]
fn places_are_those_of_the_list() {
    let rules = compile(vec![rule(9, vec![path(&["/b"])]), rule(3, vec![path(&["/a"])])]);
    let listed: Vec<_> = rules.decisions().map(|it| (it.place, it.priority)).collect();
    assert_eq!(listed, [(0, 0), (1, 3), (2, 9)]);
    assert_eq!(rules.decide(&get("", "/b").view()).place, 2);
}

#[test]
fn hosts_have_no_case_no_port_and_no_root() {
    let rules = compile(vec![
        rule(1, vec![host(&["WWW.example.com"])]),
        rule(2, vec![host(&["*.example.com"])]),
        rule(3, vec![host(&["[2001:DB8::1]"])]),
    ]);
    for (host, decided) in [
        ("www.example.com", 1),
        ("www.Example.COM:8080", 1),
        ("www.example.com.", 1),
        ("www.example.com.:80", 1),
        ("test.EXAMPLE.com", 2),
        ("example.com", 0),
        ("www.example.com.evil.org", 0),
        ("", 0),
        ("[2001:db8::1]:80", 3),
    ] {
        assert_eq!(get(host, "/").decided(&rules), decided, "{host}");
    }
}

#[test]
fn paths_have_case_and_come_as_they_are() {
    let rules = compile(vec![rule(1, vec![path(&["/img/*"])]), rule(2, vec![path(&["/a?c"])])]);
    for (url, decided) in [
        ("/img/picture.jpg", 1),
        ("/img/", 1),
        ("/img", 0),
        ("/IMG/picture.jpg", 0),
        ("/%69mg/picture.jpg", 0),
        ("/x/../img/picture.jpg", 0),
        ("//img/picture.jpg", 0),
        ("/img/../secret", 1),
        ("/abc", 2),
        ("/a%41c", 0),
        ("/x?/img/picture.jpg", 0),
        ("/img/?a=b", 1),
    ] {
        assert_eq!(get("h", url).decided(&rules), decided, "{url}");
    }
}

#[test]
fn header_values_have_no_case_and_each_line_is_one() {
    let rules = compile(vec![
        rule(
            1,
            vec![Condition::HttpHeader {
                name: "user-agent".to_owned(),
                values: wildcards(&["*Chrome*", "*Safari*"]),
            }],
        ),
        rule(
            2,
            vec![Condition::HttpHeader { name: "x-beta".to_owned(), values: regexes(&["^yes.$"]) }],
        ),
    ]);
    assert_eq!(get("h", "/").decided(&rules), 0);
    assert_eq!(get("h", "/").with("user-agent", b"a CHROME/1").decided(&rules), 1);
    assert_eq!(get("h", "/").with("user-agent", b"curl").decided(&rules), 0);
    let two = get("h", "/").with("user-agent", b"curl").with("user-agent", b"Safari");
    assert_eq!(two.decided(&rules), 1);
    assert_eq!(get("h", "/").with("x-beta", b"YES\xff").decided(&rules), 2);
    assert_eq!(get("h", "/").with("x-beta", b"YES").decided(&rules), 0);
}

#[test]
fn methods_are_exact() {
    let rules = compile(vec![rule(
        1,
        vec![Condition::HttpRequestMethod(vec!["CUSTOM-METHOD".to_owned(), "GET".to_owned()])],
    )]);
    let mut request = get("h", "/");
    assert_eq!(request.decided(&rules), 1);
    for (method, decided) in [("CUSTOM-METHOD", 1), ("custom-method", 0), ("HEAD", 0)] {
        request.method = Method::from_bytes(method.as_bytes()).unwrap();
        assert_eq!(request.decided(&rules), decided, "{method}");
    }
}

#[test]
fn query_parameters() {
    let pair = |key: Option<&str>, value: &str| QueryPattern {
        key: key.map(str::to_owned),
        value: value.to_owned(),
    };
    let rules = compile(vec![
        rule(
            1,
            vec![Condition::QueryString(vec![pair(Some("version"), "v1"), pair(None, "example")])],
        ),
        rule(2, vec![Condition::QueryString(vec![pair(Some("a+b"), "c%20*")])]),
        rule(3, vec![Condition::QueryString(vec![pair(Some("flag"), "")])]),
        rule(4, vec![Condition::QueryString(vec![pair(Some("star"), r"\*")])]),
    ]);
    for (url, decided) in [
        ("/?version=v1", 1),
        ("/?VERSION=V1", 1),
        ("/?x=y&version=v1&z", 1),
        ("/?version=v11", 0),
        ("/?xversion=v1", 0),
        ("/?anything=example", 1),
        ("/?=example", 1),
        ("/?example", 0),
        ("/?version=v1=", 0),
        ("/?a+b=c%20d", 2),
        ("/?a%20b=c%20d", 0),
        ("/?a+b=c d", 0),
        ("/?flag", 3),
        ("/?flag=", 3),
        ("/?flag=1", 0),
        ("/?star=*", 4),
        ("/?star=x", 0),
        ("/?", 0),
        ("/?&&&", 0),
        ("/version=v1", 0),
    ] {
        assert_eq!(get("h", url).decided(&rules), decided, "{url}");
    }
}

#[test]
fn sources_are_the_connection_s() {
    let networks = ["192.0.2.0/24", "198.51.100.10/32", "2001:db8::/32"];
    let networks = networks.iter().map(|it| it.parse().unwrap()).collect();
    let rules = compile(vec![rule(1, vec![Condition::SourceIp(networks)])]);
    for (source, decided) in [
        ("192.0.2.255", 1),
        ("198.51.100.10", 1),
        ("198.51.100.11", 0),
        ("2001:db8::1", 1),
        ("2001:db9::1", 0),
        ("::ffff:192.0.2.1", 1),
    ] {
        let request = Request { source: source.parse().unwrap(), ..get("h", "/") }
            .with("x-forwarded-for", b"192.0.2.1");
        assert_eq!(request.decided(&rules), decided, "{source}");
    }
}

#[test]
fn regular_expressions_match_anywhere() {
    let rules = compile(vec![
        rule(1, vec![Condition::PathPattern(regexes(&["^/v[0-9]+/"]))]),
        rule(2, vec![Condition::HostHeader(regexes(&[r"^(a|b)\.example\.com$"]))]),
        rule(3, vec![Condition::PathPattern(regexes(&["user"]))]),
    ]);
    assert_eq!(get("h", "/v12/x").decided(&rules), 1);
    assert_eq!(get("h", "/V12/x").decided(&rules), 0);
    assert_eq!(get("B.example.com:1", "/").decided(&rules), 2);
    assert_eq!(get("h", "/x/users/y").decided(&rules), 3);
}

#[test]
fn what_a_checked_configuration_never_has() {
    let regex = Condition::PathPattern(regexes(&["("]));
    let error = Rules::compile(&listener(vec![rule(1, vec![regex])])).unwrap_err();
    assert!(matches!(&error, CompileError::Regex { pattern, .. } if pattern == "("));
    assert!(error.to_string().contains("unclosed group"), "{error}");
    let header = Condition::HttpHeader { name: "a b".to_owned(), values: wildcards(&["*"]) };
    assert_eq!(
        Rules::compile(&listener(vec![rule(1, vec![header])])).unwrap_err(),
        CompileError::HeaderName("a b".to_owned())
    );
}

/// The rules one by one, without the index.
fn one_by_one(rules: &[model::Rule], request: &Request) -> u16 {
    let mut rules: Vec<_> = rules.to_vec();
    rules.sort_by_key(|rule| rule.priority);
    rules
        .into_iter()
        .find(|rule| request.decided(&compile(vec![rule.clone()])) != 0)
        .map_or(0, |rule| rule.priority)
}

fn any_condition() -> impl Strategy<Value = Condition> {
    let hosts = prop::sample::subsequence(
        vec!["a.b", "*.b", "c.d", "A.b", "*", "?.d", "a*.b", "*d", "*.a.b"],
        1..3,
    );
    let paths =
        prop::sample::subsequence(vec!["/", "/a", "/a/*", "/a/b", "/a*", "*/b", "/?/b", "b"], 1..4);
    prop_oneof![
        hosts.prop_map(|values| host(&values)),
        paths.prop_map(|values| path(&values)),
        Just(Condition::PathPattern(regexes(&["^/a"]))),
        Just(Condition::HttpRequestMethod(vec!["GET".to_owned()])),
    ]
}

proptest! {
    #[test]
    fn the_index_changes_nothing(
        conditions in prop::collection::vec(prop::collection::vec(any_condition(), 1..3), 0..8),
        host in prop::sample::select(vec!["a.b", "x.b", "c.d", "e", "", ".b", "x.a.b", "x..b.", "cd"]),
        path in prop::sample::select(vec!["/", "/a", "/a/", "/a/b", "/ab", "/c/b", "b", "", "//b"]),
    ) {
        let mut rules: Vec<_> =
            (1..).zip(conditions).map(|(priority, conditions)| rule(priority, conditions)).collect();
        rules.reverse();
        let request = get(host, path);
        prop_assert_eq!(request.decided(&compile(rules.clone())), one_by_one(&rules, &request));
    }
}

/// Nanoseconds of a decision: `(among one rule, among a hundred)`, medians of turns.
fn cost(rule_of: impl Fn(usize) -> Condition, request: &Request) -> (u32, u32) {
    let rules = |count: usize| {
        compile((0..count).map(|i| rule(i as u16 + 1, vec![rule_of(99 - i)])).collect())
    };
    let (one, hundred) = (rules(1), rules(100));
    let time = |rules: &Rules| {
        let view = request.view();
        let start = Instant::now();
        for _ in 0..50 {
            black_box(rules.decide(black_box(&view)));
        }
        start.elapsed() / 50
    };
    let mut turns: Vec<(Duration, Duration)> =
        (0..1001).map(|_| (time(&one), time(&hundred))).collect();
    let mut median = |part: fn(&(Duration, Duration)) -> Duration| {
        turns.sort_by_key(part);
        part(&turns[turns.len() / 2]).subsec_nanos()
    };
    (median(|turn| turn.0), median(|turn| turn.1))
}

#[test]
#[ignore = "a measurement"]
fn cost_of_a_decision() {
    let request = get("api.example.com", "/api/v1/users/42?version=v1")
        .with("user-agent", b"Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36");
    let print = |what, (one, hundred): (u32, u32)| {
        println!("{what:24} among 1: {one:5} ns, among 100: {hundred:5} ns");
    };
    print("/apiN/*, none meets", cost(|i| path(&[&format!("/api{i}/*")]), &request));
    print("host, none meets", cost(|i| host(&[&format!("api{i}.example.com")]), &request));
    let host_and_path = |i: usize| path(&["/api/*", &format!("/b{i}")]);
    print("/api/*, first meets", cost(host_and_path, &request));
    print("*.N.example.com", cost(|i| host(&[&format!("*.{i}.example.com")]), &request));
    print("*/N*x", cost(|i| path(&[&format!("*/{i}*x")]), &request));
    print(
        "^/aN/.*$",
        cost(|i| Condition::PathPattern(regexes(&[&format!("^/api/v{i}0/.*$")])), &request),
    );
    print(
        "user-agent *N*",
        cost(
            |i| Condition::HttpHeader {
                name: "user-agent".to_owned(),
                values: wildcards(&[&format!("*Agent{i}*")]),
            },
            &request,
        ),
    );
    let query = |i: usize| {
        Condition::QueryString(vec![QueryPattern {
            key: Some("version".to_owned()),
            value: format!("v{i}0"),
        }])
    };
    print("?version=vN", cost(query, &request));
}
