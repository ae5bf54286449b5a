//! A journey as one line of `key=value`, for `grep`.

use std::fmt::Write as _;

use super::story::{Context, Story};

/// The line. Values with spaces are in quotes.
pub fn line(number: &str, clock: &str, story: &Story<'_>, context: Context<'_>) -> String {
    let mut fields: Vec<(&str, String)> = vec![("time", clock.to_owned()), ("packet", format!("#{number}"))];
    if let Some(packet) = story.journey.first() {
        fields.push(("proto", packet.proto.to_string().to_lowercase()));
        fields.push(("kind", packet.kind()));
        for (key, address) in [("src", packet.source()), ("dst", packet.destination())] {
            fields.push((key, if packet.has_ports() { address.to_string() } else { address.ip().to_string() }));
        }
    }
    let (service, backend) = story.journey.service();
    if service != 0 {
        fields.push(("service", context.names.service(service)));
        fields.extend(context.names.backends.get(&backend).map(|backend| ("backend", backend.address.to_string())));
    }
    fields.push(("result", story.ending.name().to_owned()));
    if let Some(cause) = &story.cause {
        fields.push(("reason", cause.reason.clone()));
        fields.push(("class", cause.class.to_owned()));
        fields.push(("place", cause.place.clone()));
    }
    fields.push(("netfilter", if story.is_touched(context.hooks) { "yes" } else { "no" }.to_owned()));
    fields.push(("br_netfilter", if story.bridge_nf { "yes" } else { "no" }.to_owned()));
    fields.push(("total_ns", story.journey.total().to_string()));
    fields.push(("own_ns", story.split.own.to_string()));
    let mut text = String::new();
    for (key, value) in fields {
        if !text.is_empty() {
            text.push(' ');
        }
        let quoted = value.contains(' ') || value.is_empty();
        let _ = if quoted { write!(text, "{key}={value:?}") } else { write!(text, "{key}={value}") };
    }
    text
}
