//! Addresses, neighbours, routes and links.
