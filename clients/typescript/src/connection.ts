import type { SecureClientSessionOptions } from "node:http2";
import { isIP } from "node:net";
import type { Transport } from "@connectrpc/connect";
import { createGrpcTransport, Http2SessionManager } from "@connectrpc/connect-node";
import { nameTask, retry, showToken } from "./interceptors.js";

/** How to reach a server that requires more than an address. */
export interface ConnectionOptions {
  /** Sent with every call; only over TLS, or to this machine. */
  token?: string;
  /** PEM certificates of the authorities to trust; Node's own by default. */
  ca?: string | Buffer;
  /** PEM certificate and key of the caller, if the server requires one (mutual TLS). */
  cert?: string | Buffer;
  key?: string | Buffer;
  /** Sends the token to another machine even without TLS: anyone listening then has it. */
  allowClearToken?: boolean;
  /** The deadline of calls that have none of their own; none by default. */
  timeoutMs?: number;
}

/** The client's own credentials cannot be used as they are. */
export class CredentialsError extends Error {
  override name = "CredentialsError";
}

const MAX_RESPONSE_BYTES = 256 * 2 ** 20;
// A server that vanished is noticed during a long call; more frequent pings would have the server close the connection.
const PING_INTERVAL_MS = 300_000;

/** What calls go through, and a function that ends it. */
export function connect(url: string, options: ConnectionOptions): [Transport, () => void] {
  const baseUrl = new URL(url);
  const token = checkedToken(baseUrl, options);
  const { ca, cert, key } = options;
  if ((cert === undefined) !== (key === undefined)) {
    throw new CredentialsError("a caller's certificate and its key must be given together");
  }
  if (baseUrl.protocol !== "https:" && (ca ?? cert)) {
    throw new CredentialsError(`certificates are for https; ${url} is not encrypted`);
  }
  const tls: SecureClientSessionOptions = {
    ...(ca === undefined ? {} : { ca }),
    ...(cert === undefined || key === undefined ? {} : { cert, key }),
  };
  const sessionManager = new Http2SessionManager(url, { pingIntervalMs: PING_INTERVAL_MS }, tls);
  const transport = createGrpcTransport({
    baseUrl: url,
    sessionManager,
    interceptors: [...(token ? [showToken(token)] : []), nameTask, retry],
    readMaxBytes: MAX_RESPONSE_BYTES,
    ...(options.timeoutMs === undefined ? {} : { defaultTimeoutMs: options.timeoutMs }),
  });
  return [transport, () => sessionManager.abort()];
}

function checkedToken(url: URL, options: ConnectionOptions): string {
  const token = options.token?.trim() ?? "";
  if (token && !/^[!-~]+$/.test(token)) {
    throw new CredentialsError("a token is one word of printable ASCII characters");
  }
  if (token && url.protocol !== "https:" && !options.allowClearToken && !isThisMachine(url.hostname)) {
    throw new CredentialsError(`without TLS, the token would be readable by anyone between here and ${url.host}`);
  }
  return token;
}

/** Whether calls stay on this machine; false if that is not certain. */
function isThisMachine(hostname: string): boolean {
  return hostname === "localhost" || hostname === "[::1]" || (isIP(hostname) === 4 && hostname.startsWith("127."));
}
