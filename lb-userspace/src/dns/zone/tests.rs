use super::*;

const WEB: &str = "internal-web-0000000001";

fn zone() -> Zone {
    let addresses = ["10.0.1.100", "10.0.2.100", "fd00:1::100"];
    let only_v4 = ["10.0.3.100"];
    let parse = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    Zone {
        origin: "elb.internal".into(),
        serial: 7,
        servers: parse(&["10.0.0.53"]),
        names: BTreeMap::from([
            (WEB.into(), parse(&addresses)),
            ("api-0000000002".into(), parse(&only_v4)),
            ("empty-0000000003".into(), Vec::new()),
            ("many-0000000004".into(), (0..100).map(|n| [10, 0, 4, n].into()).collect()),
        ]),
    }
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(4711, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn ask_by(message: &Message, transport: Transport) -> Message {
    let bytes = zone().answer(&message.to_vec().unwrap(), transport, 0).expect("an answer");
    let answer = Message::from_vec(&bytes).unwrap();
    assert_eq!(answer.metadata.id, message.metadata.id);
    assert_eq!(answer.metadata.message_type, MessageType::Response);
    assert!(!answer.metadata.recursion_available);
    answer
}

fn ask(name: &str, kind: RecordType) -> Message {
    let answer = ask_by(&query(name, kind), Transport::Udp);
    assert!(answer.metadata.recursion_desired);
    answer
}

fn data(answer: &Message) -> Vec<String> {
    answer.answers.iter().map(|record| record.data.to_string()).collect()
}

fn code(answer: &Message) -> ResponseCode {
    answer.metadata.response_code
}

#[test]
fn addresses_of_either_family() {
    let a = ask(&format!("{WEB}.elb.internal."), RecordType::A);
    assert_eq!(data(&a), ["10.0.1.100", "10.0.2.100"]);
    assert!(a.metadata.authoritative && a.answers.iter().all(|record| record.ttl == 60));
    let aaaa = ask(&format!("{WEB}.elb.internal."), RecordType::AAAA);
    assert_eq!(data(&aaaa), ["fd00:1::100"]);
    let any = ask(&format!("{WEB}.elb.internal."), RecordType::ANY);
    assert_eq!(any.answers.len(), 3);
}

#[test]
fn the_first_address_is_another_each_time() {
    let message = query(&format!("{WEB}.elb.internal."), RecordType::A).to_vec().unwrap();
    let first = |turn| {
        let bytes = zone().answer(&message, Transport::Udp, turn).unwrap();
        data(&Message::from_vec(&bytes).unwrap())
    };
    assert_eq!(first(0), ["10.0.1.100", "10.0.2.100"]);
    assert_eq!(first(1), ["10.0.2.100", "10.0.1.100"]);
    assert_eq!(first(usize::MAX), first(usize::MAX % 2));
}

/// Resolvers choose letters' case at random, and want it back as it was.
#[test]
fn case_does_not_matter_and_comes_back() {
    let name = "InTeRnAl-WeB-0000000001.ELB.iNtErNaL.";
    let answer = ask(name, RecordType::A);
    assert_eq!(answer.answers.len(), 2);
    assert_eq!(answer.queries[0].name().to_ascii(), name);
    assert_eq!(answer.answers[0].name.to_ascii(), name);
}

/// RFC 2308: there is no such name, or it has nothing of this type; for how long that may be
/// remembered is in the zone's SOA.
#[test]
fn what_is_not_there() {
    for (name, kind, expected) in [
        ("nobody.elb.internal.", RecordType::A, ResponseCode::NXDomain),
        ("x.api-0000000002.elb.internal.", RecordType::A, ResponseCode::NXDomain),
        ("*.elb.internal.", RecordType::A, ResponseCode::NXDomain),
        ("api-0000000002.elb.internal.", RecordType::AAAA, ResponseCode::NoError),
        ("api-0000000002.elb.internal.", RecordType::MX, ResponseCode::NoError),
        ("api-0000000002.elb.internal.", RecordType::HTTPS, ResponseCode::NoError),
        ("empty-0000000003.elb.internal.", RecordType::A, ResponseCode::NoError),
        ("elb.internal.", RecordType::A, ResponseCode::NoError),
        ("ns.elb.internal.", RecordType::AAAA, ResponseCode::NoError),
    ] {
        let answer = ask(name, kind);
        assert_eq!((code(&answer), answer.answers.len()), (expected, 0), "{name} {kind}");
        assert!(answer.metadata.authoritative, "{name} {kind}");
        let [authority] = &answer.authorities[..] else { panic!("{name} {kind}: no SOA") };
        let RData::SOA(soa) = &authority.data else { panic!("{name} {kind}: {authority}") };
        assert_eq!((authority.ttl, soa.minimum), (60, 60));
        assert_eq!(authority.name.to_ascii(), "elb.internal.");
    }
}

#[test]
fn the_zone_itself() {
    let soa = ask("elb.internal.", RecordType::SOA);
    let [Record { data: RData::SOA(soa), .. }] = &soa.answers[..] else { panic!("{soa}") };
    assert_eq!(soa.mname.to_ascii(), "ns.elb.internal.");
    assert_eq!(soa.serial, 7);
    assert_eq!(data(&ask("ELB.internal.", RecordType::NS)), ["ns.elb.internal."]);
    assert_eq!(data(&ask("ns.elb.internal.", RecordType::A)), ["10.0.0.53"]);
}

#[test]
fn other_zones_are_refused() {
    for name in ["example.com.", "internal.", ".", "xelb.internal.", "elb.internal.example."] {
        let answer = ask(name, RecordType::A);
        assert_eq!(code(&answer), ResponseCode::Refused, "{name}");
        assert!(!answer.metadata.authoritative && answer.authorities.is_empty(), "{name}");
    }
    assert_eq!(code(&ask("elb.internal.", RecordType::AXFR)), ResponseCode::Refused);
    let mut chaos = query("elb.internal.", RecordType::SOA);
    chaos.queries[0].set_query_class(DNSClass::CH);
    assert_eq!(code(&ask_by(&chaos, Transport::Udp)), ResponseCode::Refused);
}

/// RFC 6891.
#[test]
fn edns() {
    let name = format!("{WEB}.elb.internal.");
    assert!(ask(&name, RecordType::A).edns.is_none());
    let mut message = query(&name, RecordType::A);
    let mut edns = Edns::new();
    edns.set_max_payload(4096).set_dnssec_ok(true);
    message.set_edns(edns.clone());
    let answer = ask_by(&message, Transport::Udp);
    let theirs = answer.edns.as_ref().expect("EDNS for who has it");
    assert_eq!((theirs.version(), theirs.max_payload()), (0, 1232));
    assert_eq!((code(&answer), answer.answers.len()), (ResponseCode::NoError, 2));
    edns.set_version(1);
    message.set_edns(edns);
    let answer = ask_by(&message, Transport::Udp);
    assert_eq!(answer.edns.as_ref().map(Edns::version), Some(0));
    assert!(answer.answers.is_empty());
    assert_eq!(u16::from(code(&answer)), 16, "BADVERS");
}

#[test]
fn what_does_not_fit_comes_by_tcp() {
    let mut message = query("many-0000000004.elb.internal.", RecordType::A);
    let size = |message: &Message, transport| {
        let bytes = zone().answer(&message.to_vec().unwrap(), transport, 0).unwrap();
        (bytes.len(), Message::from_vec(&bytes).unwrap().metadata.truncation)
    };
    let (length, is_cut) = size(&message, Transport::Udp);
    assert!(length <= 512 && is_cut, "{length} bytes");
    let (length, is_cut) = size(&message, Transport::Tcp);
    assert!(length > 1600 && !is_cut, "{length} bytes");
    assert_eq!(ask_by(&message, Transport::Tcp).answers.len(), 100);
    let mut edns = Edns::new();
    edns.set_max_payload(4096);
    message.set_edns(edns);
    let (length, is_cut) = size(&message, Transport::Udp);
    assert!((513..=1232).contains(&length) && is_cut, "{length} bytes");
}

#[test]
fn what_is_no_query_gets_an_error_or_nothing() {
    let zone = zone();
    let good = query("elb.internal.", RecordType::SOA).to_vec().unwrap();
    for length in 0..good.len() {
        let answer = zone.answer(&good[..length], Transport::Udp, 0);
        assert_eq!(answer.is_some(), length >= HEADER, "{length} bytes");
        if let Some(answer) = answer {
            let answer = Message::from_vec(&answer).unwrap();
            assert_eq!((answer.metadata.id, code(&answer)), (4711, ResponseCode::FormErr));
        }
    }
    let mut response = good.clone();
    response[2] |= 0x80;
    assert_eq!(zone.answer(&response, Transport::Udp, 0), None, "two servers would never stop");
    assert_eq!(zone.answer(&response[..20], Transport::Udp, 0), None);
    let mut two = query("elb.internal.", RecordType::SOA);
    two.add_query(Query::query(Name::root(), RecordType::A));
    assert_eq!(code(&ask_by(&two, Transport::Udp)), ResponseCode::FormErr);
    let mut update = query("elb.internal.", RecordType::SOA);
    update.metadata.op_code = OpCode::Notify;
    assert_eq!(code(&ask_by(&update, Transport::Udp)), ResponseCode::NotImp);
}
