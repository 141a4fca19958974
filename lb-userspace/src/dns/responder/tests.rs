use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use hickory_proto::op::{Message, MessageType, OpCode, Query};
use hickory_proto::rr::{Name, RData, RecordType};
use tokio::net::UdpSocket;

use super::*;

fn zone(addresses: &[[u8; 4]]) -> Zone {
    let addresses = addresses.iter().map(|octets| IpAddr::from(*octets)).collect();
    Zone {
        origin: "elb.internal".into(),
        serial: 1,
        servers: Vec::new(),
        names: BTreeMap::from([("web".into(), addresses)]),
    }
}

/// A responder on a port of its own.
fn start(address: &str, zone: &Zone) -> (Responder, SocketAddr) {
    for _ in 0..100 {
        let port = 20_000 + rand::random::<u16>() % 10_000;
        let listen = SocketAddr::new(address.parse().unwrap(), port);
        if let Ok(responder) = Responder::start(listen, zone.clone()) {
            return (responder, listen);
        }
    }
    panic!("no free port");
}

fn query(id: u16) -> Vec<u8> {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    let name = Name::from_ascii("web.elb.internal.").unwrap();
    message.add_query(Query::query(name, RecordType::A));
    message.to_vec().unwrap()
}

fn addresses(answer: &[u8]) -> Vec<Ipv4Addr> {
    let answer = Message::from_vec(answer).unwrap();
    let address = |data: &RData| match data {
        RData::A(address) => address.0,
        other => panic!("{other}"),
    };
    answer.answers.iter().map(|record| address(&record.data)).collect()
}

async fn ask_udp(server: SocketAddr) -> Vec<Ipv4Addr> {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    // Who answers from another address is not heard.
    socket.connect(server).await.unwrap();
    socket.send(&query(1)).await.unwrap();
    let mut buffer = [0; 512];
    let answer = timeout(Duration::from_secs(5), socket.recv(&mut buffer)).await;
    addresses(&buffer[..answer.expect("an answer in time").unwrap()])
}

#[tokio::test]
async fn answers_follow_the_zone_and_take_turns() {
    let (responder, listen) = start("127.0.0.1", &zone(&[[10, 0, 0, 1]]));
    assert_eq!(ask_udp(listen).await, [Ipv4Addr::new(10, 0, 0, 1)]);
    responder.tell(zone(&[[10, 0, 0, 2], [10, 0, 0, 3]]));
    let mut first = BTreeSet::new();
    for _ in 0..64 {
        let answer = ask_udp(listen).await;
        assert_eq!(answer.len(), 2);
        first.insert(answer[0]);
    }
    // That 64 throws come out alike happens once in 2^63 runs.
    assert_eq!(first.len(), 2);
}

#[tokio::test]
async fn it_answers_from_the_address_that_was_asked() {
    let (_responder, listen) = start("0.0.0.0", &zone(&[[10, 0, 0, 1]]));
    for last in [1, 2, 77] {
        let server = SocketAddr::from(([127, 0, 0, last], listen.port()));
        assert_eq!(ask_udp(server).await.len(), 1);
    }
}

#[tokio::test]
async fn many_queries_a_connection() {
    let (_responder, listen) = start("127.0.0.1", &zone(&[[10, 0, 0, 1]]));
    let mut stream = TcpStream::connect(listen).await.unwrap();
    let framed = |id| [&(query(id).len() as u16).to_be_bytes()[..], &query(id)].concat();
    // At once, as RFC 7766 allows.
    stream.write_all(&[framed(1), framed(2), framed(3)].concat()).await.unwrap();
    for id in 1..=3 {
        let mut answer = vec![0; usize::from(stream.read_u16().await.unwrap())];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(Message::from_vec(&answer).unwrap().metadata.id, id);
        assert_eq!(addresses(&answer), [Ipv4Addr::new(10, 0, 0, 1)]);
    }
    stream.write_all(&[0xff, 0xff]).await.unwrap();
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0, "what is too long ends the connection");
}

#[tokio::test]
async fn the_address_is_free_when_it_ends() {
    let (responder, listen) = start("127.0.0.1", &zone(&[]));
    let taken = Responder::start(listen, zone(&[])).map(|_| ()).unwrap_err();
    assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
    drop(responder);
    for _ in 0..200 {
        if Responder::start(listen, zone(&[])).is_ok() {
            return;
        }
        sleep(Duration::from_millis(20)).await;
    }
    panic!("still taken");
}
