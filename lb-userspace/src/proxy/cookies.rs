//! Stickiness: cookies of the load balancer that say which target a client has, or which group.
//!
//! Source: "Sticky sessions" in AWS's guide to application load balancers. `AWSALB` is of groups
//! with `lb_cookie`, `AWSALBAPP` of those with `app_cookie`, `AWSALBTG` of actions that forward to
//! several groups. `AWSALB` and `AWSALBTG` have a twin with `CORS` at the end of its name, which
//! browsers send to other sites, too. Cookies have `Expires` and are renewed with every response.
//!
//! # Contents
//! base64url (RFC 4648 section 5) of
//!
//! | bytes | |
//! |---|---|
//! | 1 | version, 1 |
//! | 16 | salt of whoever sealed it |
//! | 8 | number of the cookie, big endian |
//! | rest | AES-256-GCM of what follows, with its tag of 16 bytes behind it |
//! | 8 | end of the stickiness, seconds since 1970, big endian |
//! | rest | address and port of the target, or name of the group, as text |
//!
//! The key of AES is HMAC-SHA256 of the salt under the configured key; so each process has keys of
//! its own, and a nonce (four zeros and the number) never comes twice under one of them. All nodes
//! with the same configured key read each other's cookies. Name of the cookie and what it is of
//! (the target group, or the load balancer) are authenticated with it: one cookie does not pass for
//! another. What does not open, has ended or is of something else is ignored, without a word to
//! the client.

use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::hmac;
use data_encoding::BASE64URL_NOPAD;
use hyper::header::{self, HeaderMap, HeaderValue};

const VERSION: u8 = 1;
const SALT: usize = 16;
const NUMBER: usize = 8;
const HEAD: usize = 1 + SALT + NUMBER;
/// The longest value that is looked into: a group's name has at most a few dozen characters.
const LONGEST: usize = 512;
/// Cookies of a name that are tried, so that a thousand of them cost no more.
const MOST_TRIED: usize = 4;
/// How long browsers keep `AWSALBAPP` ("its own expiry of 7 days, non-configurable").
const APP_COOKIE_KEPT: Duration = Duration::from_secs(7 * 24 * 3600);

/// What a cookie is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `AWSALB`: a target, for as long as the group says.
    Target,
    /// `AWSALBAPP`: a target, with a cookie of the application's.
    Application,
    /// `AWSALBTG`: a group.
    Group,
}

impl Kind {
    /// Its name, and that of its twin.
    fn names(self) -> (&'static str, Option<&'static str>) {
        match self {
            Self::Target => ("AWSALB", Some("AWSALBCORS")),
            Self::Application => ("AWSALBAPP", None),
            Self::Group => ("AWSALBTG", Some("AWSALBTGCORS")),
        }
    }
}

/// Seals and opens cookies. One for all threads.
pub struct Cookies {
    master: hmac::Key,
    salt: [u8; SALT],
    own: LessSafeKey,
    next: AtomicU64,
}

impl fmt::Debug for Cookies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cookies(..)")
    }
}

impl Cookies {
    /// With the configured key, or a random one for this process.
    pub fn new(key: &[u8; 32]) -> Self {
        let master = hmac::Key::new(hmac::HMAC_SHA256, key);
        let salt: [u8; SALT] = rand::random();
        let own = derived(&master, &salt);
        Self { master, salt, own, next: AtomicU64::new(0) }
    }

    /// The target that a client has. `of` is the name of the target group.
    pub fn target(
        &self,
        headers: &HeaderMap,
        kind: Kind,
        of: &str,
        now: SystemTime,
    ) -> Option<SocketAddr> {
        self.find(headers, kind, of, now, |text| text.parse().ok())
    }

    /// The name of the group that a client has. `of` is the name of the load balancer; the group
    /// need not be one of those that the request may go to.
    pub fn group(&self, headers: &HeaderMap, of: &str, now: SystemTime) -> Option<String> {
        self.find(headers, Kind::Group, of, now, |text| Some(text.to_owned()))
    }

    fn find<T>(
        &self,
        headers: &HeaderMap,
        kind: Kind,
        of: &str,
        now: SystemTime,
        read: impl Fn(&str) -> Option<T>,
    ) -> Option<T> {
        let (name, twin) = kind.names();
        [Some(name), twin].into_iter().flatten().find_map(|name| {
            values(headers, name)
                .take(MOST_TRIED)
                .find_map(|value| self.open(value, kind, of, now, &read))
        })
    }

    fn open<T>(
        &self,
        value: &[u8],
        kind: Kind,
        of: &str,
        now: SystemTime,
        read: impl Fn(&str) -> Option<T>,
    ) -> Option<T> {
        if value.len() > LONGEST {
            return None;
        }
        let mut bytes = BASE64URL_NOPAD.decode(value).ok()?;
        let (head, sealed) = bytes.split_at_mut_checked(HEAD)?;
        let (version, head) = head.split_first()?;
        let (salt, number) = head.split_first_chunk::<SALT>()?;
        if *version != VERSION {
            return None;
        }
        let number: [u8; NUMBER] = number.try_into().ok()?;
        let aad = Aad::from(associated(kind, of));
        let opened = if *salt == self.salt {
            self.own.open_in_place(nonce(number), aad, sealed)
        } else {
            derived(&self.master, salt).open_in_place(nonce(number), aad, sealed)
        };
        let (end, text) = opened.ok()?.split_first_chunk::<8>()?;
        if u64::from_be_bytes(*end) <= seconds(now) {
            return None;
        }
        read(std::str::from_utf8(text).ok()?)
    }

    /// The `Set-Cookie` fields that keep a client with a target. `of` is the name of the target
    /// group. `SameSite` and `Secure` for [`Kind::Application`] as [`takes_same_site`] says.
    pub fn keep_target(
        &self,
        kind: Kind,
        of: &str,
        target: SocketAddr,
        duration: Duration,
        now: SystemTime,
        same_site: bool,
    ) -> Vec<HeaderValue> {
        // For others there is the twin, so that they stay as they are.
        let same_site = same_site && kind == Kind::Application;
        self.keep(kind, of, &target.to_string(), duration, now, same_site)
    }

    /// The `Set-Cookie` fields that keep a client with a group. `of` is the name of the load
    /// balancer.
    pub fn keep_group(
        &self,
        of: &str,
        group: &str,
        duration: Duration,
        now: SystemTime,
    ) -> Vec<HeaderValue> {
        self.keep(Kind::Group, of, group, duration, now, false)
    }

    fn keep(
        &self,
        kind: Kind,
        of: &str,
        text: &str,
        duration: Duration,
        now: SystemTime,
        same_site: bool,
    ) -> Vec<HeaderValue> {
        let Some(value) = self.seal(kind, of, text, now + duration) else { return Vec::new() };
        let kept = if kind == Kind::Application { APP_COOKIE_KEPT } else { duration };
        let expires = httpdate::fmt_http_date(now + kept);
        let (name, twin) = kind.names();
        let cross_site = "; SameSite=None; Secure";
        let lines = [
            Some((name, if same_site { cross_site } else { "" })),
            twin.map(|name| (name, cross_site)),
        ];
        lines
            .into_iter()
            .flatten()
            .filter_map(|(name, end)| {
                let line = format!("{name}={value}; Expires={expires}; Path=/{end}");
                HeaderValue::try_from(line).ok()
            })
            .collect()
    }

    /// `None` only if the cipher fails, which it does not for a few bytes.
    fn seal(&self, kind: Kind, of: &str, text: &str, end: SystemTime) -> Option<String> {
        let number = self.next.fetch_add(1, Relaxed).to_be_bytes();
        let mut content = seconds(end).to_be_bytes().to_vec();
        content.extend_from_slice(text.as_bytes());
        let aad = Aad::from(associated(kind, of));
        self.own.seal_in_place_append_tag(nonce(number), aad, &mut content).ok()?;
        let mut bytes = Vec::with_capacity(HEAD + content.len());
        bytes.push(VERSION);
        bytes.extend_from_slice(&self.salt);
        bytes.extend_from_slice(&number);
        bytes.extend_from_slice(&content);
        Some(BASE64URL_NOPAD.encode(&bytes))
    }
}

fn derived(master: &hmac::Key, salt: &[u8; SALT]) -> LessSafeKey {
    let tag = hmac::sign(master, salt);
    let key = UnboundKey::new(&AES_256_GCM, tag.as_ref());
    // HMAC-SHA256 is as long as the cipher's key.
    LessSafeKey::new(key.expect("32 bytes are a key of AES-256"))
}

fn nonce(number: [u8; NUMBER]) -> Nonce {
    let mut nonce = [0; 12];
    nonce[12 - NUMBER..].copy_from_slice(&number);
    Nonce::assume_unique_for_key(nonce)
}

fn associated(kind: Kind, of: &str) -> Vec<u8> {
    let (name, _) = kind.names();
    [name.as_bytes(), b"\0", of.as_bytes()].concat()
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The values of a cookie, RFC 6265 section 5.4: `name=value` between semicolons.
fn values<'a>(headers: &'a HeaderMap, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
    headers
        .get_all(header::COOKIE)
        .iter()
        .flat_map(|line| line.as_bytes().split(|byte| *byte == b';'))
        .filter_map(move |pair| {
            pair.trim_ascii_start().strip_prefix(name.as_bytes())?.strip_prefix(b"=")
        })
        .map(<[u8]>::trim_ascii_end)
}

/// Whether a request has a cookie: the application's, without which `AWSALBAPP` means nothing.
pub fn has_cookie(headers: &HeaderMap, name: &str) -> bool {
    values(headers, name).next().is_some()
}

/// Whether a response sets a cookie: the application's, with which stickiness begins.
pub fn sets_cookie(headers: &HeaderMap, name: &str) -> bool {
    headers.get_all(header::SET_COOKIE).iter().any(|line| {
        let name = line.as_bytes().trim_ascii_start().strip_prefix(name.as_bytes());
        name.is_some_and(|rest| rest.trim_ascii_start().starts_with(b"="))
    })
}

/// Whether a browser knows `SameSite=None`: Chromium 80 and newer, as AWS decides about
/// `AWSALBAPP`. Only for connections with TLS: such cookies are `Secure`.
pub fn takes_same_site(headers: &HeaderMap) -> bool {
    let agent = headers.get(header::USER_AGENT).and_then(|agent| agent.to_str().ok());
    let version = agent.and_then(|agent| agent.split_once("Chrome/"));
    version.is_some_and(|(_, version)| {
        let digits = version.split(|c: char| !c.is_ascii_digit()).next();
        digits.and_then(|digits| digits.parse::<u32>().ok()).is_some_and(|major| major >= 80)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    fn cookies() -> Cookies {
        Cookies::new(&[7; 32])
    }

    fn target() -> SocketAddr {
        "[2001:db8::1]:8080".parse().unwrap()
    }

    /// `Cookie` of what a response sets.
    fn sent(fields: &[HeaderValue]) -> HeaderMap {
        let pairs = fields.iter().map(|field| field.to_str().unwrap().split(';').next().unwrap());
        cookie(&pairs.collect::<Vec<_>>().join("; "))
    }

    fn cookie(line: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::COOKIE, HeaderValue::from_str(line).unwrap());
        headers
    }

    fn keep(cookies: &Cookies) -> Vec<HeaderValue> {
        cookies.keep_target(Kind::Target, "web", target(), HOUR, now(), false)
    }

    #[test]
    fn attributes_are_aws_s() {
        let set = keep(&cookies());
        let lines: Vec<_> = set.iter().map(|line| line.to_str().unwrap()).collect();
        let (first, rest) = lines[0].split_once("; ").unwrap();
        let (twin, twin_rest) = lines[1].split_once("; ").unwrap();
        assert_eq!(lines.len(), 2);
        assert_eq!(rest, "Expires=Fri, 15 Jan 2027 09:00:00 GMT; Path=/");
        assert_eq!(twin_rest, format!("{rest}; SameSite=None; Secure"));
        assert_eq!(first.strip_prefix("AWSALB="), twin.strip_prefix("AWSALBCORS="));

        let lines = cookies().keep_target(Kind::Target, "web", target(), HOUR, now(), true);
        assert!(!lines[0].to_str().unwrap().contains("SameSite"), "{lines:?}");
        assert!(lines[1].to_str().unwrap().ends_with("; SameSite=None; Secure"), "{lines:?}");
        let app = cookies().keep_target(Kind::Application, "web", target(), HOUR, now(), true);
        let line = app[0].to_str().unwrap();
        assert_eq!(app.len(), 1);
        assert!(line.starts_with("AWSALBAPP="), "{line}");
        assert!(
            line.ends_with(
                "; Expires=Fri, 22 Jan 2027 08:00:00 GMT; Path=/; SameSite=None; Secure"
            ),
            "{line}"
        );
        let group = cookies().keep_group("site", "api", HOUR, now());
        assert!(group[0].to_str().unwrap().starts_with("AWSALBTG="));
        assert!(group[1].to_str().unwrap().starts_with("AWSALBTGCORS="));
    }

    #[test]
    fn another_node_and_a_restart_read_it() {
        let headers = sent(&keep(&cookies()));
        let other = cookies();
        assert_eq!(other.target(&headers, Kind::Target, "web", now()), Some(target()));
        let twin = sent(&keep(&cookies())[1..]);
        assert_eq!(other.target(&twin, Kind::Target, "web", now()), Some(target()));
        let stranger = Cookies::new(&[8; 32]);
        assert_eq!(stranger.target(&headers, Kind::Target, "web", now()), None);
    }

    #[test]
    fn it_ends_inside_whatever_the_browser_thinks() {
        let cookies = cookies();
        let headers = sent(&keep(&cookies));
        let found = |at| cookies.target(&headers, Kind::Target, "web", at);
        assert_eq!(found(now() + HOUR - Duration::from_secs(1)), Some(target()));
        assert_eq!(found(now() + HOUR), None);
        let app = cookies.keep_target(Kind::Application, "web", target(), HOUR, now(), false);
        let at = now() + HOUR;
        assert_eq!(cookies.target(&sent(&app), Kind::Application, "web", at), None);
    }

    #[test]
    fn one_does_not_pass_for_another() {
        let cookies = cookies();
        let headers = sent(&keep(&cookies));
        assert_eq!(cookies.target(&headers, Kind::Target, "api", now()), None);
        let value = headers[header::COOKIE].to_str().unwrap().split_once('=').unwrap().1;
        let value = value.split(';').next().unwrap();
        let renamed = cookie(&format!("AWSALBAPP={value}; AWSALBTG={value}"));
        assert_eq!(cookies.target(&renamed, Kind::Application, "web", now()), None);
        assert_eq!(cookies.group(&renamed, "web", now()), None);
        let group = cookies.keep_group("site", "10.0.0.1:80", HOUR, now());
        assert_eq!(cookies.group(&sent(&group), "site", now()).as_deref(), Some("10.0.0.1:80"));
        assert_eq!(cookies.group(&sent(&group), "other", now()), None);
    }

    #[test]
    fn among_many_and_large_ones() {
        let cookies = cookies();
        let good = sent(&keep(&cookies));
        let good = good[header::COOKIE].to_str().unwrap().split(';').next().unwrap().to_owned();
        let found = |line: &str| cookies.target(&cookie(line), Kind::Target, "web", now());
        assert_eq!(found(&format!("a=b;{good} ;c")), Some(target()));
        assert_eq!(found(&format!("xAWSALB=1; AWSALB; AWSALB=; {good}")), Some(target()));
        assert_eq!(found(&format!("{}{good}", "AWSALB=AAAA; ".repeat(3))), Some(target()));
        assert_eq!(found(&format!("{}{good}", "AWSALB=AAAA; ".repeat(4))), None);
        assert_eq!(found(&format!("AWSALB={}; {good}", "A".repeat(100_000))), Some(target()));
        assert_eq!(found(&good.replace('=', "=%")), None);
        assert_eq!(found(&good.replace("AWSALB", "awsalb")), None);
        let mut lines = cookie("a=b");
        lines.append(header::COOKIE, HeaderValue::from_bytes(b"\xff; \"").unwrap());
        lines.append(header::COOKIE, HeaderValue::from_str(&good).unwrap());
        assert_eq!(cookies.target(&lines, Kind::Target, "web", now()), Some(target()));
    }

    #[test]
    fn no_two_are_alike() {
        let cookies = cookies();
        assert_ne!(keep(&cookies)[0], keep(&cookies)[0]);
    }

    #[test]
    fn the_application_s_cookie() {
        let mut response = HeaderMap::new();
        assert!(!sets_cookie(&response, "SESSION"));
        response.append(header::SET_COOKIE, HeaderValue::from_static("SESSIONS=1"));
        response.append(header::SET_COOKIE, HeaderValue::from_static("x=SESSION=1"));
        assert!(!sets_cookie(&response, "SESSION"));
        response.append(header::SET_COOKIE, HeaderValue::from_static("SESSION=1; Path=/"));
        assert!(sets_cookie(&response, "SESSION"));
        assert!(has_cookie(&cookie("a=b; SESSION="), "SESSION"));
        assert!(!has_cookie(&cookie("SESSIONS=1"), "SESSION"));
    }

    #[test]
    fn chromium_knows_same_site() {
        let agent = |agent: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::USER_AGENT, HeaderValue::from_str(agent).unwrap());
            takes_same_site(&headers)
        };
        assert!(agent("Mozilla/5.0 (X11) Chrome/80.0.3987 Safari/537.36"));
        assert!(agent("HeadlessChrome/120.0"));
        assert!(!agent("Chrome/79.9"));
        assert!(!agent("Safari/605 Version/13"));
        assert!(!agent("Chrome/99999999999999"));
    }

    proptest! {
        #[test]
        fn tampering_is_never_accepted(at in any::<prop::sample::Index>(), bit in 0_u8..8) {
            let cookies = cookies();
            let value = cookies.seal(Kind::Target, "web", "10.0.0.1:80", now() + HOUR).unwrap();
            let mut bytes = BASE64URL_NOPAD.decode(value.as_bytes()).unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            let headers = cookie(&format!("AWSALB={}", BASE64URL_NOPAD.encode(&bytes)));
            prop_assert_eq!(cookies.target(&headers, Kind::Target, "web", now()), None);
        }

        #[test]
        fn nothing_a_client_makes_up_is_accepted(value in "[A-Za-z0-9_=;, -]{0,200}") {
            let headers = cookie(&format!("AWSALB={value}"));
            prop_assert_eq!(cookies().target(&headers, Kind::Target, "web", now()), None);
        }
    }
}
