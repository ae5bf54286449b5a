//! A BPF object with one program that does nothing: what a test run costs by itself.
//!
//! ```text
//!   ELF header · code · symbols · names · section names · 5 section headers
//! ```

/// Name of the program.
pub(crate) const PROGRAM: &str = "empty";

/// `r0 = -1; exit`: TC_ACT_UNSPEC.
const CODE: [u8; 16] = [0xb7, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x95, 0, 0, 0, 0, 0, 0, 0];
/// Symbol names.
const NAMES: &[u8] = b"\0empty\0";
/// Section names, with where each begins.
const SECTIONS: &[u8] = b"\0classifier\0.symtab\0.strtab\0.shstrtab\0";
const CLASSIFIER: u32 = 1;
const SYMTAB: u32 = 12;
const STRTAB: u32 = 20;
const SHSTRTAB: u32 = 28;

const HEADER: u64 = 64;
const SYMBOL: u64 = 24;

/// A section header (gABI chapter 4).
struct Section {
    name: u32,
    kind: u32,
    flags: u64,
    offset: u64,
    size: u64,
    link: u32,
    info: u32,
    align: u64,
    entry: u64,
}

/// The object, in this machine's byte order.
pub(crate) fn object() -> Vec<u8> {
    let (code, symbols) = (HEADER, HEADER + CODE.len() as u64);
    let names = symbols + 2 * SYMBOL;
    let section_names = names + NAMES.len() as u64;
    let headers = (section_names + SECTIONS.len() as u64).next_multiple_of(8);

    let mut object = vec![0x7f, b'E', b'L', b'F', 2, if cfg!(target_endian = "little") { 1 } else { 2 }, 1];
    object.resize(16, 0);
    // Relocatable, for BPF.
    put16(&mut object, &[1, 247]);
    put32(&mut object, &[1]);
    put64(&mut object, &[0, 0, headers]);
    put32(&mut object, &[0]);
    put16(&mut object, &[64, 0, 0, 64, 5, 4]);

    object.extend(CODE);
    object.resize(object.len() + 24, 0);
    // The program: a global function at the start of section 1.
    put32(&mut object, &[1]);
    object.extend([0x12, 0]);
    put16(&mut object, &[1]);
    put64(&mut object, &[0, CODE.len() as u64]);
    object.extend(NAMES);
    object.extend(SECTIONS);
    object.resize(usize::try_from(headers).unwrap_or_default(), 0);

    let null = Section { name: 0, kind: 0, flags: 0, offset: 0, size: 0, link: 0, info: 0, align: 0, entry: 0 };
    let strings =
        |name, offset, bytes: &[u8]| Section { name, kind: 3, offset, size: bytes.len() as u64, align: 1, ..null };
    let sections = [
        Section { ..null },
        // Allocated and executable.
        Section { name: CLASSIFIER, kind: 1, flags: 6, offset: code, size: CODE.len() as u64, align: 8, ..null },
        // One local symbol (the null one) before the global one; names in section 3.
        Section {
            name: SYMTAB,
            kind: 2,
            offset: symbols,
            size: 2 * SYMBOL,
            link: 3,
            info: 1,
            align: 8,
            entry: SYMBOL,
            ..null
        },
        strings(STRTAB, names, NAMES),
        strings(SHSTRTAB, section_names, SECTIONS),
    ];
    for Section { name, kind, flags, offset, size, link, info, align, entry } in sections {
        put32(&mut object, &[name, kind]);
        put64(&mut object, &[flags, 0, offset, size]);
        put32(&mut object, &[link, info]);
        put64(&mut object, &[align, entry]);
    }
    object
}

fn put16(object: &mut Vec<u8>, words: &[u16]) {
    object.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
}

fn put32(object: &mut Vec<u8>, words: &[u32]) {
    object.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
}

fn put64(object: &mut Vec<u8>, words: &[u64]) {
    object.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
}
