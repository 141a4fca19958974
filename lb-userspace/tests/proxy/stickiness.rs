//! What keeps clients with targets and groups, and what takes them away from failing ones.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use lb_userspace::config::model::{
    Action, CookieStickiness, Forward, RequestAlgorithm, WeightedTargetGroup,
};
use lb_userspace::proxy::routes::{FULL_SHARE, TargetRoute, TargetState};

use crate::harness::{Answer, Client, HELLO, Site, answers, ask};

const HOUR: Duration = Duration::from_secs(3600);

const NAMES: [&str; 4] = [
    "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na",
    "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nb",
    "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nc",
    "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nd",
];

/// Servers that say their names.
async fn named() -> [SocketAddr; 4] {
    [
        answers(NAMES[0]).await,
        answers(NAMES[1]).await,
        answers(NAMES[2]).await,
        answers(NAMES[3]).await,
    ]
}

/// What a client sends back of the cookies that an answer sets.
fn cookies(answer: &Answer) -> String {
    let fields = answer.head.lines().filter_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("set-cookie").then(|| value.split(';').next().unwrap().trim())
    });
    fields.collect::<Vec<_>>().join("; ")
}

async fn ask_with(address: SocketAddr, cookies: &str) -> Answer {
    ask(address, format!("GET / HTTP/1.1\r\nHost: a\r\nCookie: {cookies}\r\n\r\n")).await
}

/// Whether a client with these cookies always gets the same, for as many requests as would show
/// turns among four.
async fn stays(address: SocketAddr, cookies: &str, body: &[u8]) -> bool {
    for _ in 0..8 {
        if ask_with(address, cookies).await.body != body {
            return false;
        }
    }
    true
}

#[tokio::test]
async fn awsalb_holds_over_reloads_and_draining_and_not_beyond() {
    let targets = named().await;
    let (mut site, address) = Site::new(&targets[..3]);
    let group = site.groups.get_mut("web").unwrap();
    group.settings.stickiness = Some(CookieStickiness::LbCookie { duration: HOUR });
    let proxy = site.start();
    let first = Client::connect(address).await.get("/").await;
    let cookie = cookies(&first);
    assert!(cookie.starts_with("AWSALB="), "{cookie}");
    assert!(stays(address, &cookie, &first.body).await);

    // A target joins, and its own drains.
    let of_client = NAMES.iter().position(|it| it.as_bytes().ends_with(&first.body)).unwrap();
    let group = site.groups.get_mut("web").unwrap();
    group.targets.push(TargetRoute {
        address: targets[3],
        weight: 1,
        share: FULL_SHARE,
        zone: None,
        state: TargetState::InService,
    });
    group.targets[of_client].state = TargetState::Draining;
    assert_eq!(proxy.apply(site.routes()), []);
    assert!(stays(address, &cookie, &first.body).await);
    // Others do not get it.
    for _ in 0..6 {
        assert_ne!(Client::connect(address).await.get("/").await.body, first.body);
    }

    // Out of service, it loses the client, which gets a cookie of another.
    site.groups.get_mut("web").unwrap().targets[of_client].state = TargetState::OutOfService;
    assert_eq!(proxy.apply(site.routes()), []);
    let second = ask_with(address, &cookie).await;
    assert_ne!(second.body, first.body);
    assert!(stays(address, &cookies(&second), &second.body).await);
}

#[tokio::test]
async fn awsalbapp_holds_as_long_as_the_applications_cookie() {
    let [a, b] = [
        "HTTP/1.1 200 OK\r\nSet-Cookie: SESSION=1\r\nContent-Length: 1\r\n\r\na",
        "HTTP/1.1 200 OK\r\nSet-Cookie: SESSION=2\r\nContent-Length: 1\r\n\r\nb",
    ];
    let (mut site, address) = Site::new(&[answers(a).await, answers(b).await]);
    let stickiness = CookieStickiness::AppCookie { name: "SESSION".to_owned(), duration: HOUR };
    site.groups.get_mut("web").unwrap().settings.stickiness = Some(stickiness);
    let proxy = site.start();
    let first = Client::connect(address).await.get("/").await;
    let both = cookies(&first);
    assert!(both.contains("SESSION=") && both.contains("; AWSALBAPP"), "{both}");
    assert!(stays(address, &both, &first.body).await);
    assert_eq!(proxy.apply(site.routes()), []);
    assert!(stays(address, &both, &first.body).await);
    let (_, own) = both.split_once("; ").unwrap();
    assert!(!stays(address, own, &first.body).await, "without the application's cookie");
}

#[tokio::test]
async fn awsalbapp_needs_the_applications_cookie() {
    let (mut site, address) = Site::new(&[answers(HELLO).await]);
    let stickiness = CookieStickiness::AppCookie { name: "SESSION".to_owned(), duration: HOUR };
    site.groups.get_mut("web").unwrap().settings.stickiness = Some(stickiness);
    let _proxy = site.start();
    assert_eq!(cookies(&Client::connect(address).await.get("/").await), "");
}

#[tokio::test]
async fn awsalbtg_holds_a_group_over_reloads() {
    let targets = named().await;
    let (mut site, address) = Site::new(&targets[..1]);
    site.group("api", &targets[1..2], |_| {});
    let forward = |weights: [u16; 2]| {
        let group =
            |(name, weight): (&str, u16)| WeightedTargetGroup { name: name.to_owned(), weight };
        Action::Forward(Forward {
            target_groups: [("web", weights[0]), ("api", weights[1])].map(group).to_vec(),
            stickiness: Some(HOUR),
        })
    };
    let change = |site: &mut Site, weights| {
        let route = site.listeners.get_mut(&address).unwrap();
        let mut listener = (*route.listener).clone();
        listener.default_action = forward(weights);
        route.listener = Arc::new(listener);
    };
    change(&mut site, [1, 1]);
    let proxy = site.start();
    let first = Client::connect(address).await.get("/").await;
    let second = Client::connect(address).await.get("/").await;
    assert_ne!(first.body, second.body);
    for answer in [&first, &second] {
        let cookie = cookies(answer);
        assert!(cookie.starts_with("AWSALBTG="), "{cookie}");
        assert!(stays(address, &cookie, &answer.body).await);
    }

    // Another target in its group, and a weight of 0: who is there stays there.
    let of_client = if first.body == b"a" { "web" } else { "api" };
    change(&mut site, if of_client == "web" { [0, 1] } else { [1, 0] });
    site.group(of_client, &targets[2..3], |_| {});
    assert_eq!(proxy.apply(site.routes()), []);
    assert!(stays(address, &cookies(&first), b"c").await);
    for _ in 0..4 {
        assert_eq!(Client::connect(address).await.get("/").await.body, second.body);
    }
}

#[tokio::test]
async fn a_failing_target_gets_less_after_a_while() {
    const FAILS: &str = "HTTP/1.1 500 Broken\r\nContent-Length: 0\r\n\r\n";
    let mut targets = vec![answers(FAILS).await];
    for _ in 0..2 {
        targets.push(answers(HELLO).await);
    }
    let (mut site, address) = Site::new(&targets);
    site.groups.get_mut("web").unwrap().settings.algorithm =
        RequestAlgorithm::WeightedRandom { anomaly_mitigation: true };
    let proxy = site.start();
    let mut client = Client::connect(address).await;
    let mut failures = async |requests: usize| {
        let mut failures = 0;
        for _ in 0..requests {
            failures += usize::from(client.get("/").await.status() == 500);
        }
        failures
    };
    assert!((30..170).contains(&failures(300).await), "a third of 300, 8 sigma");
    // A reload in between forgets nothing.
    assert_eq!(proxy.apply(site.routes()), []);
    tokio::time::sleep(Duration::from_millis(10_500)).await;
    // A half of what the others get is 120 of 600; a third would be 200. 3.7 sigma.
    assert!((20..158).contains(&failures(600).await));
}
