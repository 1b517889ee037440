//! Compiles the image's records; builds and flattens the blobs that run inside tasks.

#[path = "build/blob.rs"]
mod blob;
#[path = "build/records.rs"]
mod records;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    records::compile("proto/image.proto", Some("image.bin"));
    records::compile("proto/criu.proto", None);
    blob::build("parasite");
    blob::build("restorer");
}
