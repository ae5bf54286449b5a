//! Does a packet match? A rough answer: the reader judges again, with all that the packet became.

use proxy_abi::trace::{ROWS, TraceEnd, TraceFilter, TraceRow, count};
use proxy_abi::{IpBytes, PortBe};

use crate::kernel::{Header, read};
use crate::maps::{self, END, ROW};

/// Could the packet whose IP header is at this address match? Most could not, by their addresses alone: it spares all that
/// is read and told apart of a packet otherwise.
#[inline(always)]
pub(crate) fn may_match(filter: &TraceFilter, header: u64) -> bool {
    let any = filter.flags & (TraceFilter::ANY_A | TraceFilter::ANY_B);
    if any == TraceFilter::ANY_A | TraceFilter::ANY_B {
        return true;
    }
    // Version, and the addresses of either family: RFC 791, 8200.
    let words: [u32; 10] = read(header);
    let (src, dst) = if words[0].to_ne_bytes()[0] >> 4 == 4 {
        (IpBytes::from_v4_word(words[3]), IpBytes::from_v4_word(words[4]))
    } else {
        (IpBytes([words[2], words[3], words[4], words[5]]), IpBytes([words[6], words[7], words[8], words[9]]))
    };
    let src = filter.ends & TraceFilter::bit_of(&src) != 0;
    let dst = filter.ends & TraceFilter::bit_of(&dst) != 0;
    if any == 0 { src && dst } else { src || dst }
}

/// Sides that an address with a port belongs to. `ends`: [`TraceFilter::ends`].
#[inline(always)]
fn sides(ip: &IpBytes, port: PortBe, ends: u32) -> u32 {
    if ends & TraceFilter::bit_of(ip) == 0 {
        return 0;
    }
    let mut key = TraceEnd { ip: *ip, port: PortBe(0), reserved: 0, reserved_more: 0 };
    let Some(found) = END.get_ptr(&key) else { return 0 };
    // SAFETY: a pointer into a map that was just found; here and below.
    let mut sides = unsafe { *found };
    if sides & TraceEnd::PORTS != 0 {
        key.port = port;
        if let Some(found) = END.get_ptr(&key) {
            // SAFETY: as above.
            sides |= unsafe { *found };
        }
    }
    sides
}

/// Is it from one side to the other, either way?
#[inline(always)]
fn joins_sides(flags: u32, ends: u32, header: &Header) -> bool {
    if flags & (TraceFilter::ANY_A | TraceFilter::ANY_B) == TraceFilter::ANY_A | TraceFilter::ANY_B {
        return true;
    }
    let any = if flags & TraceFilter::ANY_A != 0 { TraceEnd::A } else { 0 }
        | if flags & TraceFilter::ANY_B != 0 { TraceEnd::B } else { 0 };
    let src = sides(&header.src, header.src_port, ends) | any;
    let dst = sides(&header.dst, header.dst_port, ends) | any;
    let forth = src & TraceEnd::A != 0 && dst & TraceEnd::B != 0;
    let back = src & TraceEnd::B != 0 && dst & TraceEnd::A != 0;
    forth || back
}

#[inline(always)]
fn within(ip: &IpBytes, net: &IpBytes, mask: &IpBytes) -> bool {
    let [a, b, c, d] = ip.0;
    let [na, nb, nc, nd] = net.0;
    let [ma, mb, mc, md] = mask.0;
    (a & ma ^ na) | (b & mb ^ nb) | (c & mc ^ nc) | (d & md ^ nd) == 0
}

/// Does a row hold? Its index, and where the headers are: 1 or 0.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn row_holds(index: u32, place: u32) -> u32 {
    let (Some(row), Some(header)) = (ROW.get_ptr(index), maps::HEADER.get_ptr(place)) else { return 0 };
    // SAFETY: entries of arrays; the headers are this program's on this CPU.
    let (row, header) = unsafe { (&*row, &*header) };
    let (src_port, dst_port) = (header.src_port.get(), header.dst_port.get());
    let mut wrong = 0;
    let mut ask = |holds: bool, part: u32| {
        wrong |= u32::from(!holds) << part.trailing_zeros();
    };
    ask(within(&header.src, &row.src, &row.src_mask), TraceRow::NOT_SRC);
    ask(within(&header.dst, &row.dst, &row.dst_mask), TraceRow::NOT_DST);
    ask(src_port >= row.src_low && src_port <= row.src_high, TraceRow::NOT_SRC_PORT);
    ask(dst_port >= row.dst_low && dst_port <= row.dst_high, TraceRow::NOT_DST_PORT);
    ask(row.proto == 0 || row.proto == header.proto, TraceRow::NOT_PROTO);
    ask(header.flags & row.flags_mask == row.flags, TraceRow::NOT_FLAGS);
    ask(row.family == 0 || row.family == header.family, TraceRow::NOT_FAMILY);
    u32::from(wrong == row.negated)
}

/// The number of a flow, the same both ways.
#[inline(always)]
fn flow_number(header: &Header) -> u32 {
    let [a, b, c, d] = header.src.0;
    let [e, f, g, h] = header.dst.0;
    let ports = u32::from(header.src_port.0) ^ u32::from(header.dst_port.0);
    let mixed = (a ^ b ^ c ^ d ^ e ^ f ^ g ^ h ^ ports).wrapping_mul(0x9e37_79b1);
    mixed ^ mixed >> 15
}

/// Does the packet whose headers are at `place` match?
#[inline(always)]
pub(crate) fn matches(filter: &TraceFilter, header: &Header, place: u32) -> bool {
    if filter.proto != 0 && filter.proto != header.proto {
        return false;
    }
    if !joins_sides(filter.flags, filter.ends, header) {
        return false;
    }
    if filter.rows != 0 {
        let mut holds = 0;
        let mut i = 0;
        while i < ROWS {
            if i >= filter.rows || holds != 0 {
                break;
            }
            holds = row_holds(i, place);
            i += 1;
        }
        if holds == 0 {
            return false;
        }
    }
    filter.sample <= 1 || flow_number(header).checked_rem(filter.sample) == Some(0)
}

/// May one more be followed from now on? Counts it, if so.
#[inline(always)]
pub(crate) fn admits(filter: &mut TraceFilter, now: u64) -> bool {
    let second = now / 1_000_000_000;
    if filter.second != second {
        filter.second = second;
        filter.begun = 0;
    }
    if filter.rate != 0 && filter.begun >= filter.rate || filter.most != 0 && filter.total >= filter.most {
        maps::count(count::RATE_LIMITED);
        return false;
    }
    filter.begun += 1;
    filter.total += 1;
    true
}
