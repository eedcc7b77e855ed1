# Sourced by the download scripts. fetch NAME FOLDER PATTERN: files of a ModelScope dataset into output/corpora/FOLDER.
# The client shows progress, resumes interrupted downloads, and verifies every file against the published sha256.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
corpora=output/corpora

message() { printf '%s\n' "$*" >&2; }

fetch() {
    local name=$1 folder=$corpora/$2 pattern=$3 command=modelscope
    if [ -x .venv/bin/modelscope ]; then command=.venv/bin/modelscope; fi
    if ! command -v "$command" >/dev/null; then
        message "error: the command modelscope is missing: run 'pip install modelscope' (it is in requirements.txt)"
        exit 2
    fi
    mkdir -p "$folder"
    message "downloading $pattern of $name into $folder ..."
    if ! "$command" download "$name" --repo-type dataset --include "$pattern" --local-dir "$folder"; then
        message "error: could not download $name (see above): check the connection to modelscope.cn and the free space, then" \
            "run this again, it resumes where it stopped; manually: https://modelscope.cn/datasets/$name, into $folder"
        exit 2
    fi
    if [ -z "$(find "$folder" -name "$pattern" -size +0 -print -quit)" ]; then
        message "error: $name no longer has a file $pattern: look at https://modelscope.cn/datasets/$name"
        exit 2
    fi
}
