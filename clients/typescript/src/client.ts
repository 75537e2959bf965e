import type { MessageInitShape } from "@bufbuild/protobuf";
import { createClient, type CallOptions as ConnectCallOptions, type Client } from "@connectrpc/connect";
import { connect, type ConnectionOptions } from "./connection.js";
import { type Adapter, AdapterService, type UploadAdapterResponse } from "./gen/manyhats/v1/adapter_pb.js";
import { EncodingService } from "./gen/manyhats/v1/encoding_pb.js";
import { type ChatMessageSchema, GenerationService, type ScoredContinuation } from "./gen/manyhats/v1/generation_pb.js";
import { ServerService } from "./gen/manyhats/v1/server_pb.js";
import { type UploadOptions, uploadDirectory } from "./upload.js";

/** Text, token ids, or a conversation. */
export type PromptText = string | number[] | MessageInitShape<typeof ChatMessageSchema>[];

/** Of every call: its deadline, and what cancels it. */
export type CallOptions = Pick<ConnectCallOptions, "timeoutMs" | "signal">;

/**
 * Talks to a manyhats server over gRPC; close it at the end.
 *
 * `adapters`, `generation`, `encoding` and `server` have every call of the API, with the fields of its .proto files in
 * camel case. Calls that change nothing are repeated if the server refuses them for now or cannot be reached. Errors are
 * `ConnectError`s; `failureOf` has the server's reason.
 */
export class ManyhatsClient {
  readonly adapters: Client<typeof AdapterService>;
  readonly generation: Client<typeof GenerationService>;
  readonly encoding: Client<typeof EncodingService>;
  readonly server: Client<typeof ServerService>;
  /** Ends running calls and closes the connection. */
  readonly close: () => void;

  /** Connects with the first call. `url` is such as "http://127.0.0.1:50051", or with TLS "https://gpu-1:50051". */
  constructor(url = "http://127.0.0.1:50051", options: ConnectionOptions = {}) {
    const [transport, close] = connect(url, options);
    this.adapters = createClient(AdapterService, transport);
    this.generation = createClient(GenerationService, transport);
    this.encoding = createClient(EncodingService, transport);
    this.server = createClient(ServerService, transport);
    this.close = close;
  }

  /** All versions, of one task or of every task, ordered by task and version; pages are fetched as needed. */
  async *list(taskId = "", options: CallOptions = {}): AsyncGenerator<Adapter> {
    let pageToken = "";
    do {
      const page = await this.adapters.listAdapters({ taskId, pageToken }, options);
      yield* page.adapters;
      pageToken = page.nextPageToken;
    } while (pageToken);
  }

  /**
   * Sends an adapter's directory, and makes it a version of a task. It is safe to repeat; what fails leaves nothing on
   * the server.
   */
  async upload(
    taskId: string,
    directory: string,
    options: UploadOptions = {},
    callOptions: CallOptions = {},
  ): Promise<UploadAdapterResponse> {
    return uploadDirectory(this.adapters, taskId, directory, options, callOptions);
  }

  /** How likely each continuation is after the prompt, in the order given; the prompt is computed once. */
  async score(
    prompt: PromptText,
    continuations: (string | number[])[],
    { taskId = "", ...options }: CallOptions & { taskId?: string } = {},
  ): Promise<ScoredContinuation[]> {
    const answer = await this.generation.score(
      {
        taskId,
        prompt: promptOf(prompt),
        continuations: continuations.map((each) => ({
          content:
            typeof each === "string" ? { case: "text", value: each } : { case: "tokenIds", value: { ids: each } },
        })),
      },
      options,
    );
    return answer.scores;
  }
}

function promptOf(prompt: PromptText) {
  if (typeof prompt === "string") {
    return { case: "text", value: prompt } as const;
  }
  return isConversation(prompt)
    ? ({ case: "chat", value: { messages: prompt } } as const)
    : ({ case: "tokenIds", value: { ids: prompt } } as const);
}

function isConversation(prompt: Exclude<PromptText, string>): prompt is MessageInitShape<typeof ChatMessageSchema>[] {
  return typeof prompt[0] === "object";
}
