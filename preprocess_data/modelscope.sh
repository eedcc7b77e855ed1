# Sourced by the download scripts. fetch NAME FOLDER PATTERN: files of a ModelScope dataset into output/corpora/FOLDER.
# The client shows progress, goes on where it was cut off, and checks every file, old or new, against the published sha256.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
corpora=output/corpora

say() { printf '%s\n' "$*" >&2; }

fetch() {
    local name=$1 folder=$corpora/$2 pattern=$3 command=modelscope
    if [ -x .venv/bin/modelscope ]; then command=.venv/bin/modelscope; fi
    if ! command -v "$command" >/dev/null; then
        say "error: the command modelscope is missing: run 'pip install modelscope' (it is in requirements.txt)"
        exit 2
    fi
    mkdir -p "$folder"
    say "downloading $pattern of $name into $folder ..."
    if ! "$command" download "$name" --repo-type dataset --include "$pattern" --local-dir "$folder"; then
        say "error: could not download $name (see above): check the connection to modelscope.cn and the free space, then" \
            "run this again, it goes on where it stopped; by hand: https://modelscope.cn/datasets/$name, into $folder"
        exit 2
    fi
    if [ -z "$(find "$folder" -name "$pattern" -size +0 -print -quit)" ]; then
        say "error: $name holds no file $pattern any more: look at https://modelscope.cn/datasets/$name"
        exit 2
    fi
}
