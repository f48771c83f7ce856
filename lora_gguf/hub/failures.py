"""What huggingface_hub raises, each failure as one line that says what to do.

No server text and no header is ever part of a line, so no token is.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from lora_gguf.errors import FileError, HubError, IntegrityError, LoraGgufError, printable

LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
# class name of the client's error (of requests too, which it used before 1.0), first match wins -> what to say
EXPLANATIONS = (
    ("GatedRepoError", "access is restricted: ask for it at {page}, then " + LOG_IN),
    ("DisabledRepoError", "the Hub has disabled this repository: see {page}"),
    ("RevisionNotFoundError", "there is no revision '{revision}': see the branches and tags at {page}/tree/main"),
    ("RepositoryNotFoundError", "no such repository at {host}, or a private one: check the name, or " + LOG_IN),
    ("LocalEntryNotFoundError", "not in the cache, and {host} cannot be asked: check the network"),
    ("EntryNotFoundError", "there is no file {file} in revision '{revision}': see {page}/tree/main"),
    ("OfflineModeIsEnabled", "not in the cache, and offline mode is on: unset HF_HUB_OFFLINE to download it"),
    ("HFValidationError", "not the name of a repository: expected OWNER/NAME"),
    ("FileMetadataError", "{host} does not answer as a Hub does: check HF_ENDPOINT and any proxy"),
    (
        "JSONDecodeError",
        "{host} answered with something else than JSON: check HF_ENDPOINT, and whether a proxy asks for a login",
    ),
    ("TooManyRedirects", "{host} redirects without end: check HF_ENDPOINT"),
    ("UnsupportedProtocol", "{host} redirects to something that is not http: check HF_ENDPOINT"),
    ("ProxyError", "the proxy refused the connection: check HTTPS_PROXY"),
    ("TimeoutException", "{host} did not answer in time: try again, or set HF_HUB_DOWNLOAD_TIMEOUT to more seconds"),
    ("Timeout", "{host} did not answer in time: try again, or set HF_HUB_DOWNLOAD_TIMEOUT to more seconds"),
    ("InvalidSchema", "{host} redirects to something that is not http: check HF_ENDPOINT"),
    (
        "ConnectError",
        "cannot connect to {host} ({reason}): check the network, or set HF_HUB_OFFLINE=1 to use the cache",
    ),
    ("RemoteProtocolError", "{host} keeps breaking the connection: try again later"),
    ("NetworkError", "the connection to {host} failed ({reason}): try again"),
    ("ConnectionError", "the connection to {host} failed ({reason}): try again"),
    ("XetDownloadError", "the download failed: try again, or set HF_HUB_DISABLE_XET=1"),
)
STATUS_EXPLANATIONS = {
    401: "{host} did not accept the token: " + LOG_IN,
    403: "{host} refuses access (HTTP 403): see {page}, and check what the token may read",
    404: "{host} does not have it (HTTP 404): check the name",
    429: "{host} asks to slow down (HTTP 429): try again in some minutes",
}


def host() -> str:
    """Return the Hub's host and port, without what else its address may hold (a password)."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    return printable((parts.hostname or "") + (f":{parts.port}" if parts.port else ""))


def page(repo_id: str) -> str:
    """Return the address of a repository's page."""
    from huggingface_hub import constants

    return f"{urlsplit(constants.ENDPOINT).scheme}://{host()}/{repo_id}"


def explained(error: Exception, repo_id: str, revision: str, file: str, cache: str) -> LoraGgufError:
    """Return ``error``, which huggingface_hub raised on ``file`` (may be empty) of a repository, as one line."""
    names = {base.__name__ for base in type(error).__mro__}
    if "LocalEntryNotFoundError" in names and isinstance(error.__cause__, Exception):
        return explained(error.__cause__, repo_id, revision, file, cache)
    where = ": ".join(filter(None, (printable(repo_id), printable(file))))
    status = getattr(getattr(error, "response", None), "status_code", 0)
    template = next((text for name, text in EXPLANATIONS if name in names), None) or STATUS_EXPLANATIONS.get(status)
    if template is None and status:
        template = f"{{host}} answered with HTTP {status}: " + (
            "it has trouble, try again later" if status >= 500 else "see {page}"
        )
    if template is None and isinstance(error, OSError) and error.errno:
        return FileError(f"{printable(cache)}: cannot write to the cache: {error.strerror}: make room, or set HF_HOME")
    if template is None and "Consistency check failed" in str(error):
        return IntegrityError(f"{where}: the download ended early or late: its size is wrong: try again")
    template = template or f"the client failed with {type(error).__name__}: try again, or upgrade huggingface_hub"
    reason = printable(getattr(error, "strerror", None) or error, 80)
    return HubError(
        f"{where}: " + template.format(page=page(repo_id), host=host(), revision=revision, file=file, reason=reason)
    )
