//! A folder of the host in a stock Debian guest, by binary translation as an ordinary user: mounted, read, written, listed, renamed,
//! seen from both sides at once, and without a way out.

use paravane_tests::archive::archive;
use paravane_tests::host::{self, Stage};
use paravane_tests::process;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);

/// What the guest does. Every line that begins with "not ok" is a failure; the end is said too.
const SCRIPT: &str = r#"
for m in virtio virtio_ring virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci fuse virtiofs; do
    [ -f /modules/$m.ko ] && insmod /modules/$m.ko
done
mkdir -p /mnt /ro
check() { what=$1; shift; if "$@" >/tmp/out 2>&1; then echo "ok - $what"; else echo "not ok - $what"; cat /tmp/out; fi; }
refuse() { what=$1; shift; if "$@" >/tmp/out 2>&1; then echo "not ok - $what was let through"; else echo "ok - $what is refused"; fi; }
same() { [ "$1" = "$2" ] || { echo "got: $1"; echo "wanted: $2"; false; }; }

check "mount" mount -t virtiofs work /mnt
refuse "another tag" mount -t virtiofs nothing /ro
check "mount readonly" mount -t virtiofs look /ro
cd /mnt
check "read" same "$(cat from-host)" "hello from the host"
check "list" same "$(ls | tr '\n' ' ')" "absolute dots from-host large many "
check "a long file" same "$(md5sum < large | cut -d' ' -f1)" "$(cat /large.md5)"
check "many names" same "$(ls many | wc -l)" 700
check "write" sh -c 'echo hello from the guest > from-guest && echo more >> from-guest'
check "write much" sh -c 'cat large large large > copied && cmp -n 3000000 large copied'
check "make folders" mkdir -p a/b/c
check "rename" sh -c 'echo x > a/one && mv a/one a/b/two && [ ! -e a/one ] && same=$(cat a/b/two) && [ "$same" = x ]'
check "rename a folder" mv a/b a/z
check "link" sh -c 'ln a/z/two a/hard && [ "$(stat -c %h a/hard)" = 2 ]'
check "symlink" sh -c 'ln -s z/two a/soft && [ "$(cat a/soft)" = x ]'
check "mode and size" sh -c 'chmod 600 a/hard && truncate -s 1000000 a/hard && [ "$(stat -c "%a %s" a/z/two)" = "600 1000000" ]'
check "times" sh -c 'touch -d "2001-02-03 04:05:06" a/hard && [ "$(stat -c %Y a/z/two)" = "$(date -d "2001-02-03 04:05:06" +%s)" ]'
check "remove" sh -c 'rm from-host && [ ! -e from-host ]'
check "unlinked but open" sh -c 'exec 3<>gone; echo kept >&3; rm gone; echo again >&3; [ "$(stat -L -c %s /proc/self/fd/3)" = 11 ]'
check "sync" sh -c 'dd if=/dev/zero of=synced bs=4096 count=4 conv=fsync && sync -f synced || sync'
check "space" sh -c 'df /mnt | grep -q work'
refuse "a device node" mknod null c 1 3
refuse "rmdir of what is full" rmdir a
# Links that lead out of the folder lead nowhere, or to the guest's own files.
refuse "an absolute link" cat absolute
check "dots stay inside the guest" same "$(cat dots)" "a file of the guest"
refuse "leaving with cd" sh -c 'cd /mnt/.. && cat secret'
check "above the mount point is the guest's root" test -f /init
cd /ro
check "read there" same "$(cat from-host-too)" "to be read only"
refuse "write there" sh -c 'echo x > /ro/from-host-too'
refuse "create there" touch /ro/new
refuse "remove there" rm /ro/from-host-too
refuse "chmod there" chmod 777 /ro/from-host-too
cd /
check "unmount" umount /mnt
check "mount again" mount -t virtiofs work /mnt
check "it is still there" same "$(cat /mnt/from-guest | head -1)" "hello from the guest"
echo "shared folder: done"
"#;

/// Modules that a kernel without them built in needs, where they lie below its folder of modules.
const MODULES: [&str; 7] = [
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "fs/fuse/fuse.ko",
    "fs/fuse/virtiofs.ko",
];

/// A folder that belongs to whoever runs the hypervisor, with a secret beside it.
fn prepare(stage: &Stage, md5: &mut String) -> (PathBuf, PathBuf) {
    let outside = stage.folder("outside");
    fs::write(outside.join("secret"), "not for guests").unwrap();
    let (work, look) = (outside.join("work"), outside.join("look"));
    fs::create_dir(&work).unwrap();
    fs::create_dir(&look).unwrap();
    fs::create_dir(work.join("many")).unwrap();
    for n in 0..700 {
        fs::write(work.join(format!("many/a name that is not very short {n}")), "").unwrap();
    }
    let large: Vec<u8> = (0..3_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    fs::write(work.join("large"), &large).unwrap();
    let sum = std::process::Command::new("md5sum").arg(work.join("large")).output().expect("md5sum can be started");
    *md5 = String::from_utf8_lossy(&sum.stdout).split_whitespace().next().unwrap_or_default().to_owned();
    fs::write(work.join("from-host"), "hello from the host\n").unwrap();
    fs::write(look.join("from-host-too"), "to be read only\n").unwrap();
    fs::set_permissions(look.join("from-host-too"), fs::Permissions::from_mode(0o666)).unwrap();
    symlink(outside.join("secret"), work.join("absolute")).unwrap();
    symlink("../secret-of-the-guest", work.join("dots")).unwrap();
    stage.give_away(&outside);
    (work, look)
}

fn mounts_and_works(series: &str) {
    let Some(kernel) = host::guest_file(&format!("{series}/vmlinuz")) else { return };
    let Some(initrd) = host::guest_file("initramfs-shell.cpio") else { return };
    let stage = Stage::new();
    let mut md5 = String::new();
    let (work, look) = prepare(&stage, &mut md5);
    let secret = fs::metadata(work.join("../secret")).unwrap();
    let mut files: Vec<(String, u32, Vec<u8>)> = vec![
        ("script".into(), 0o100_755, SCRIPT.into()),
        ("large.md5".into(), 0o100_644, md5.into()),
        ("secret-of-the-guest".into(), 0o100_644, "a file of the guest\n".into()),
        ("modules".into(), 0o040_755, Vec::new()),
    ];
    for module in MODULES {
        let path = kernel.with_file_name("modules/kernel").join(module);
        if let (Ok(bytes), Some(name)) = (fs::read(&path), path.file_name()) {
            files.push((format!("modules/{}", name.to_string_lossy()), 0o100_644, bytes));
        }
    }
    let files: Vec<_> = files.iter().map(|(name, mode, bytes)| (name.as_str(), *mode, &bytes[..])).collect();
    let image = stage.file("image", &[fs::read(initrd).unwrap(), archive(&files)].concat());
    let mut command = stage.paravane(&kernel, &image, "console=ttyS0 panic=-1");
    command.arg("--fs").arg(format!("tag=work,path={}", work.display()));
    command.arg("--fs").arg(format!("tag=look,path={},readonly=on", look.display()));
    let (status, console) = process::run(&mut command, LIMIT);
    assert!(console.contains("shared folder: done"), "{console}");
    let failed: Vec<&str> = console.lines().filter(|line| line.starts_with("not ok")).collect();
    assert!(failed.is_empty(), "{failed:#?}\n{console}");
    let passed = console.lines().filter(|line| line.starts_with("ok - ")).count();
    assert_eq!((passed, status.code()), (34, Some(0)), "{console}");
    // The host's side of it.
    assert_eq!(fs::read_to_string(work.join("from-guest")).unwrap(), "hello from the guest\nmore\n");
    assert_eq!(fs::metadata(work.join("copied")).unwrap().len(), 9_000_000);
    assert!(!work.join("from-host").exists() && !work.join("gone").exists());
    let two = fs::metadata(work.join("a/z/two")).unwrap();
    assert_eq!((two.nlink(), two.mode() & 0o7777, two.len()), (2, 0o600, 1_000_000));
    assert_eq!(fs::read_link(work.join("a/soft")).unwrap().to_str(), Some("z/two"));
    let after = fs::metadata(work.join("../secret")).unwrap();
    assert_eq!((after.mtime_nsec(), after.mode(), after.len()), (secret.mtime_nsec(), secret.mode(), secret.len()));
    assert_eq!(fs::read_dir(&look).unwrap().count(), 1);
}

#[test]
fn linux_6_12_uses_a_shared_folder() {
    mounts_and_works("6.12");
}

#[test]
fn linux_6_1_uses_a_shared_folder_with_modules() {
    mounts_and_works("6.1");
}
