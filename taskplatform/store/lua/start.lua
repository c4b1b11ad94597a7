-- Lets a delivery run, if it is the job's current one: queued → assigned → running. Then releases what there is room for.
-- ARGV[1] now   ARGV[2] job id   ARGV[3] delivery   ARGV[4] worker   ARGV[5] how long ago the message arrived, in ms
-- Returns {'run', attempt, losses, execute_after, params, first attempt of this budget} or {why not}: unknown, stale, early or the job's state.

local now, id, delivery, worker = clock(ARGV[1]), ARGV[2], tonumber(ARGV[3]), ARGV[4]
local job = load_job(id)
if not job then return { 'unknown' } end
if job.delivery ~= delivery then return { 'stale' } end
if job.state ~= 'queued' then return { job.state } end
if tonumber(job.after) > now then
  -- the clock was set back since the release
  give_back(id, job, 'pending', now, tonumber(job.after), worker, 'given back: it is early', '')
  return { 'early' }
end
local attempt = job.attempt + 1
local released_at = tonumber(call('ZSCORE', K.queued .. job.priority, id) or now)
move(id, 'queued', 'assigned', math.max(now - tonumber(ARGV[5]), released_at), attempt, worker, 'received', '')
move(id, 'assigned', 'running', now, attempt, worker, 'started', '')
call('HSET', K.job .. id, 'attempt', attempt, 'worker', worker, 'started', text(now))
call('ZREM', K.queued .. job.priority, id)
call('ZADD', K.active, text(now), id)
call('SADD', K.worker_jobs .. worker, id)
-- a worker that was declared lost and came back counts again
call('ZADD', K.workers, 'NX', text(now), worker)
release(now, 10)
return { 'run', attempt, job.losses, job.after, job.params or '', tonumber(job.budget or '0') }
