#!/bin/bash
# images.sh NAME… : makes the images' tars in $CARRYON_IMAGES, when older than what goes into them.
# pause coredns shell: what every cluster needs, and a shell with a few programs for tests. worker operator: ours, from $CARRYON_BIN.
# previous-worker previous-operator: those of the release before, from $CARRYON_PREVIOUS/release.
# model: the file $CARRYON_MODEL as /models/NAME, and cp.
. "$(dirname "$0")/lib/common.sh"
bin=${CARRYON_BIN:-$CACHE/target/release}
mkdir -p "$IMAGES"

# image NAME REFERENCE PROGRAM[=PATH]…
image() {
    local tar=$IMAGES/$1.tar part
    for part in "$HERE"/image{.py,s.sh} "${@:3}"; do
        if [ ! "$tar" -nt "${part%%=*}" ]; then
            "$HERE/image.py" "$tar" "${@:2}"
            return
        fi
    done
}

# program NAME TAG FOLDER: the image of one of our programs
program() {
    [ -x "$3/carryon-$1" ] || fail "$3/carryon-$1 is missing: run \`make build\`, or \`make test-all\` for the release before"
    image "$name" "localhost/carry-on/$1:$2" "$3/carryon-$1=/usr/local/bin/carryon-$1"
}

for name in "$@"; do
    case $name in
    pause)
        [ "$IMAGES/pause" -nt "$HERE/pause.c" ] || gcc -static -O2 -o "$IMAGES/pause" "$HERE/pause.c"
        image pause localhost/pause:1 "$IMAGES/pause=/pause"
        ;;
    coredns) image coredns localhost/coredns:1 "$TOOLS/coredns=/coredns" ;;
    shell)
        programs=()
        for program in dash cat sleep ls id getent touch mkdir curl; do programs+=("$(command -v $program)=/bin/${program/dash/sh}"); done
        image shell localhost/carry-on/shell:test "${programs[@]}"
        ;;
    # Somebody else's: it names no user.
    model) CARRYON_IMAGE_USER='' image model localhost/carry-on/model:test "$(command -v cp)=/bin/cp" "${CARRYON_MODEL:?names the file}=/models/${CARRYON_MODEL##*/}" ;;
    worker | operator) program "$name" test "$bin" ;;
    previous-*) program "${name#previous-}" previous "${CARRYON_PREVIOUS:?names its folder}/release" ;;
    *) fail "no image $name" ;;
    esac
done
