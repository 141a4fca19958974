//! Answers of the load balancer's own when a request cannot be served, with AWS's status codes.

use hyper::ext::ReasonPhrase;
use hyper::header::{CONTENT_TYPE, HeaderValue, SERVER};
use hyper::{Response, StatusCode};

use super::body::ResponseBody;
use super::headers::MAX_REQUEST_LINE;

/// Why the load balancer answers by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElbError {
    /// 400: the request is not HTTP, or larger than allowed.
    BadRequest,
    /// 405: the method is TRACE.
    MethodNotAllowed,
    /// 408: the client did not send the rest of its request in time.
    RequestTimeout,
    /// 413: the request's body is larger than the load balancer takes.
    BodyTooLarge,
    /// 414: the request line is longer than allowed.
    UriTooLong,
    /// 460: the client closed the connection before it had an answer. Nobody sees the answer.
    ClientClosed,
    /// 463: `X-Forwarded-For` has more addresses than allowed.
    TooManyForwardedAddresses,
    /// 464: the target group's version of HTTP cannot carry the request.
    IncompatibleVersion,
    /// 500: an error of the load balancer.
    Internal,
    /// 501: the transfer coding is not known.
    NotImplemented,
    /// 502: a target closed its connection or gave an answer that is not HTTP.
    BadGateway,
    /// 502: a target said that it did nothing about the request, which cannot be sent again from
    /// here. Clients of HTTP/2 are told the same.
    Unprocessed,
    /// 503: there is no target that could take the request, or no capacity.
    ServiceUnavailable,
    /// 504: a target did not answer, or not connect, in time.
    GatewayTimeout,
}

impl ElbError {
    /// Why a request's head cannot be read.
    pub fn of_head(head: &[u8]) -> Self {
        let mut lines = head.split(|&byte| byte == b'\n');
        if lines.next().is_some_and(|line| line.len() > MAX_REQUEST_LINE) {
            return Self::UriTooLong;
        }
        let is_unknown_coding = |line: &[u8]| {
            let Some(colon) = line.iter().position(|&byte| byte == b':') else { return false };
            line[..colon].eq_ignore_ascii_case(b"transfer-encoding")
                && !line[colon + 1..].trim_ascii().eq_ignore_ascii_case(b"chunked")
        };
        if lines.any(is_unknown_coding) { Self::NotImplemented } else { Self::BadRequest }
    }

    /// The status code, and what it is called.
    pub fn status(self) -> (u16, &'static str) {
        match self {
            Self::BadRequest => (400, "Bad Request"),
            Self::MethodNotAllowed => (405, "Method Not Allowed"),
            Self::RequestTimeout => (408, "Request Time-out"),
            Self::BodyTooLarge => (413, "Request Entity Too Large"),
            Self::UriTooLong => (414, "Request-URI Too Large"),
            Self::ClientClosed => (460, "Client Closed Request"),
            Self::TooManyForwardedAddresses => (463, "Too Many Forwarded Addresses"),
            Self::IncompatibleVersion => (464, "Incompatible Protocol Version"),
            Self::Internal => (500, "Internal Server Error"),
            Self::NotImplemented => (501, "Not Implemented"),
            Self::BadGateway | Self::Unprocessed => (502, "Bad Gateway"),
            Self::ServiceUnavailable => (503, "Service Temporarily Unavailable"),
            Self::GatewayTimeout => (504, "Gateway Time-out"),
        }
    }

    /// The status code.
    pub fn code(self) -> u16 {
        self.status().0
    }

    /// Whether what is left of the request's connection cannot be understood, so that it ends.
    pub fn ends_connection(self) -> bool {
        matches!(
            self,
            Self::BadRequest
                | Self::RequestTimeout
                | Self::BodyTooLarge
                | Self::UriTooLong
                | Self::NotImplemented
        )
    }

    /// Whether no target is to blame.
    pub fn is_clients_fault(self) -> bool {
        self.code() < 500
    }

    fn page(self) -> String {
        let (code, name) = self.status();
        format!(
            "<html>\r\n<head><title>{code} {name}</title></head>\r\n<body>\r\n\
             <center><h1>{code} {name}</h1></center>\r\n</body>\r\n</html>\r\n"
        )
    }

    /// The answer.
    pub fn response(self) -> Response<ResponseBody> {
        let mut response = Response::new(ResponseBody::full(self.page()));
        *response.status_mut() =
            StatusCode::from_u16(self.code()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        // Some are AWS's own, of which the HTTP library has no names.
        let reason = ReasonPhrase::from_static(self.status().1.as_bytes());
        response.extensions_mut().insert(reason);
        let headers = response.headers_mut();
        headers.insert(SERVER, HeaderValue::from_static(SERVER_NAME));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/html"));
        response
    }

    /// The answer as HTTP/1.1 writes it, at the end of a connection that has no other.
    pub fn bytes(self) -> Vec<u8> {
        let (code, name) = self.status();
        let page = self.page();
        let length = page.len();
        format!(
            "HTTP/1.1 {code} {name}\r\nServer: {SERVER_NAME}\r\nContent-Type: text/html\r\n\
             Content-Length: {length}\r\nConnection: close\r\n\r\n{page}"
        )
        .into_bytes()
    }
}

/// What the load balancer's own answers say they come from.
pub const SERVER_NAME: &str = "lb";
