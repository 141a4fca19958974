//! What is answered to a query. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;

use hickory_proto::op::{Edns, Message, MessageType, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, NS, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use hickory_proto::serialize::binary::{BinEncodable as _, BinEncoder};

/// How long an answer may be remembered, that there is no such name too, seconds. AWS's.
pub const TTL: u32 = 60;
/// The name server's own label.
const SERVER: &str = "ns";
/// What UDP carries for a client that says nothing of it (RFC 1035 section 4.2.1).
const PLAIN_UDP: u16 = 512;
/// The most that UDP carries without fragments, and what is said of this server (DNS flag day 2020).
const MAX_UDP: u16 = 1232;
/// Version of EDNS (RFC 6891).
const EDNS_VERSION: u8 = 0;
/// Length of a message's header, bytes.
const HEADER: usize = 12;

/// What a zone holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Zone {
    /// What every name ends in, in lower case, without dots at its ends.
    pub origin: String,
    /// Grows with every change.
    pub serial: u32,
    /// The name server's own addresses.
    pub servers: Vec<IpAddr>,
    /// Addresses by label in lower case.
    pub names: BTreeMap<String, Vec<IpAddr>>,
}

/// How an answer travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// In one datagram.
    Udp,
    /// As long as it likes.
    Tcp,
}

/// What a name is in the zone.
enum Owner<'a> {
    /// The zone itself.
    Origin,
    /// A name with these addresses, perhaps none.
    Host(&'a [IpAddr]),
    /// There is no such name.
    Nobody,
    /// A name of another zone.
    Stranger,
}

impl Zone {
    /// The answer to a message; `None` for what is no query. `turn` is which address comes first.
    pub fn answer(&self, message: &[u8], transport: Transport, turn: usize) -> Option<Vec<u8>> {
        let request = match Message::from_vec(message) {
            Ok(request) if request.metadata.message_type == MessageType::Query => request,
            Ok(_) => return None,
            Err(_) => return malformed(message),
        };
        let response = self.respond(&request, turn);
        let limit = match transport {
            Transport::Tcp => u16::MAX,
            Transport::Udp => {
                let accepted = request.edns.as_ref().map_or(PLAIN_UDP, Edns::max_payload);
                accepted.clamp(PLAIN_UDP, MAX_UDP)
            }
        };
        encode(&response, limit)
    }

    fn respond(&self, request: &Message, turn: usize) -> Message {
        let mut response = Message::new(0, MessageType::Response, OpCode::Query);
        response.metadata = Metadata::response_from_request(&request.metadata);
        response.queries.clone_from(&request.queries);
        if let Some(theirs) = &request.edns {
            let mut edns = Edns::new();
            edns.set_version(EDNS_VERSION).set_max_payload(MAX_UDP);
            edns.set_dnssec_ok(theirs.flags().dnssec_ok);
            response.edns = Some(edns);
            if theirs.version() > EDNS_VERSION {
                return refuse(response, ResponseCode::BADVERS);
            }
        }
        if request.metadata.op_code != OpCode::Query {
            return refuse(response, ResponseCode::NotImp);
        }
        let [query] = &request.queries[..] else {
            return refuse(response, ResponseCode::FormErr);
        };
        self.look_up(query, response, turn)
    }

    fn look_up(&self, query: &Query, mut response: Message, turn: usize) -> Message {
        let origin = self.origin();
        let is_transfer = matches!(query.query_type(), RecordType::AXFR | RecordType::IXFR);
        let is_internet = matches!(query.query_class(), DNSClass::IN | DNSClass::ANY);
        let owner = self.owner(&origin, query.name());
        if matches!(owner, Owner::Stranger) || is_transfer || !is_internet {
            return refuse(response, ResponseCode::Refused);
        }
        response.metadata.authoritative = true;
        let asked = |kind| query.query_type() == kind || query.query_type() == RecordType::ANY;
        let mut answers: Vec<RData> = Vec::new();
        match owner {
            Owner::Origin => {
                answers.extend(asked(RecordType::SOA).then(|| RData::SOA(self.soa(&origin))));
                answers.extend(asked(RecordType::NS).then(|| RData::NS(NS(server(&origin)))));
            }
            Owner::Host(addresses) => {
                let mut of_type: Vec<RData> = addresses
                    .iter()
                    .map(|address| address_record(*address))
                    .filter(|record| asked(record.record_type()))
                    .collect();
                if !of_type.is_empty() {
                    let first = turn % of_type.len();
                    of_type.rotate_left(first);
                }
                answers = of_type;
            }
            Owner::Nobody => response.metadata.response_code = ResponseCode::NXDomain,
            Owner::Stranger => {}
        }
        if answers.is_empty() {
            // For how long that may be remembered (RFC 2308).
            let soa = RData::SOA(self.soa(&origin));
            response.authorities.push(Record::from_rdata(origin, TTL, soa));
        }
        let name = query.name();
        let record = |data| Record::from_rdata(name.clone(), TTL, data);
        response.answers.extend(answers.into_iter().map(record));
        response
    }

    fn owner(&self, origin: &Name, name: &Name) -> Owner<'_> {
        if !origin.zone_of(name) {
            return Owner::Stranger;
        }
        let labels = name.iter().count() - origin.iter().count();
        let first = name.iter().next().map(|label| label.to_ascii_lowercase());
        let first = first.and_then(|label| String::from_utf8(label).ok()).unwrap_or_default();
        match labels {
            0 => Owner::Origin,
            1 if first == SERVER => Owner::Host(&self.servers),
            1 => self.names.get(&first).map_or(Owner::Nobody, |addresses| Owner::Host(addresses)),
            _ => Owner::Nobody,
        }
    }

    fn origin(&self) -> Name {
        let mut origin = Name::from_ascii(&self.origin).unwrap_or_else(|_| Name::root());
        origin.set_fqdn(true);
        origin
    }

    fn soa(&self, origin: &Name) -> SOA {
        const REFRESH: i32 = 3600;
        const RETRY: i32 = 900;
        const EXPIRE: i32 = 604_800;
        let responsible = below(origin, "hostmaster");
        SOA::new(server(origin), responsible, self.serial, REFRESH, RETRY, EXPIRE, TTL)
    }
}

fn server(origin: &Name) -> Name {
    below(origin, SERVER)
}

fn below(origin: &Name, label: &str) -> Name {
    // Only a zone that is as long as a name can be has no room for it.
    origin.prepend_label(label).unwrap_or_else(|_| origin.clone())
}

fn address_record(address: IpAddr) -> RData {
    match address {
        IpAddr::V4(address) => RData::A(A(address)),
        IpAddr::V6(address) => RData::AAAA(AAAA(address)),
    }
}

fn refuse(mut response: Message, code: ResponseCode) -> Message {
    response.metadata.response_code = code;
    if let Some(edns) = &mut response.edns {
        edns.set_rcode_high(code.high());
    }
    response
}

/// To what begins like a query, but is none.
fn malformed(message: &[u8]) -> Option<Vec<u8>> {
    let [first, second, flags, ..] = *message else { return None };
    const IS_RESPONSE: u8 = 0x80;
    if message.len() < HEADER || flags & IS_RESPONSE != 0 {
        return None;
    }
    let id = u16::from_be_bytes([first, second]);
    encode(&Message::error_msg(id, OpCode::Query, ResponseCode::FormErr), PLAIN_UDP)
}

/// What does not fit is left out, and the client told to ask by TCP.
fn encode(response: &Message, limit: u16) -> Option<Vec<u8>> {
    let write = |message: &Message| {
        let mut bytes = Vec::new();
        let mut encoder = BinEncoder::new(&mut bytes);
        encoder.set_max_size(limit);
        message.emit(&mut encoder).ok().map(|()| bytes)
    };
    write(response).or_else(|| write(&response.truncate()))
}

#[cfg(test)]
mod tests;
